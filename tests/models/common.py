"""What the tests of this area share: packed inputs, and a few training steps on megatron-core's own parts."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_npd.manifest import MANIFEST, seal
from megatron_npd.platform.mcore_versions import COMMON_OBJECT, NEWER

LENGTHS = [7, 16, 9]  # segments of the row of one step


def packed_inputs(lengths: list[int], vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens [1, T], positions [1, T] and cu_seqlens [S + 1]."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    # Not 0, the padding id: transformers leaves its row at zero and gives it no gradient from the lookup.
    tokens = torch.randint(1, vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.cat([torch.arange(n) for n in lengths])[None], bounds


class TinyTrainer:
    """DDP, megatron-core's optimizer and schedule around one model, on random rows."""

    def __init__(self, model: Any, vocab_size: int, *, distributed: bool = True, lr: float = 1e-2) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self.vocab_size = vocab_size
        self.rank = parallel_state.get_data_parallel_rank()
        self.config = model.config
        self.model = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), model
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=lr,
                min_lr=0.0,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=model.config.bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=distributed,
            ),
            [self.model],
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=lr,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=20,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def step(self, iteration: int) -> float:
        """One step on a row of this iteration and data-parallel rank; the mean loss over all ranks (last stage)."""
        import torch.distributed as dist
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        from megatron_npd.models.build import packed_params

        tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.config.finalize_model_grads_func = finalize_model_grads
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = []

        def forward(_: Any, model: Any) -> Any:
            tokens, positions, bounds = packed_inputs(LENGTHS, self.vocab_size, seed=iteration * 10 + self.rank)
            out = model(tokens, positions, None, packed_seq_params=packed_params(bounds))

            def loss(logits: Tensor) -> Any:
                columns = torch.arange(logits.shape[-1]) + logits.shape[-1] * tensor_rank
                logits = logits.masked_fill(columns >= self.vocab_size, -1e30)  # the padding of the vocabulary
                value = vocab_parallel_cross_entropy(logits, tokens.roll(-1, 1)).sum()
                losses.append(value.detach().clone())
                return value, torch.tensor(tokens.numel(), dtype=torch.int), {}

            return out, loss

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(()),
            model=[self.model],
            num_microbatches=1,
            seq_length=sum(LENGTHS),
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = cast(tuple[bool, float, None], self.optimizer.step())  # its annotation has None, too
        self.grad_norm = float(norm)
        self.scheduler.step(1)
        if not losses:
            return 0.0
        total = losses[0] / sum(LENGTHS)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.item() / parallel_state.get_data_parallel_world_size()


def chained(optimizer: Any) -> list[Any]:
    """The optimizers that megatron-core's optimizer runs one after another."""
    from megatron.core.optimizer import ChainedOptimizer

    assert isinstance(optimizer, ChainedOptimizer)
    return optimizer.chained_optimizers


def full_state(trainer: TinyTrainer) -> dict[str, Tensor]:
    """Weights and optimizer state of this rank, for bitwise comparison."""
    state = {f"weight.{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    for index, optimizer in enumerate(chained(trainer.optimizer)):
        inner = optimizer.optimizer
        for group in inner.param_groups:
            state[f"step.{index}.{len(state)}"] = torch.tensor(group["step"])
            for p in group["params"]:
                for key, value in inner.state[p].items():
                    state[f"{key}.{index}.{len(state)}"] = value.clone()
    return state


def make_trainer(
    model_dir: Path, tensor: int = 1, pipeline: int = 1, *, load: bool = True, **options: Any
) -> TinyTrainer:
    """A trainer of the model in this layout, with its weights or (before a checkpoint is loaded) with zeros."""
    from megatron_npd.models.build import build_model, load_hf_weights, load_spec
    from megatron_npd.platform.initialize import initialize_distributed

    initialize_distributed(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    spec = load_spec(model_dir)
    model = build_model(spec, bf16=options.pop("bf16", False), sequence_parallel=options.pop("sp", False))
    if load:
        load_hf_weights(model, spec)
    return TinyTrainer(model, spec.vocab_size, **options)


def save(trainer: TinyTrainer, root: Path, iteration: int) -> Path:
    """Write a checkpoint of it."""
    from megatron_npd.models.checkpoint import save_checkpoint

    return save_checkpoint(
        root,
        iteration,
        model=trainer.model,
        optimizer=trainer.optimizer,
        scheduler=trainer.scheduler,
        state={"iteration": iteration, "rows": iteration * 2},
    )


def restore(trainer: TinyTrainer, path: Path) -> dict[str, Any]:
    """Load one into it."""
    from megatron_npd.models.checkpoint import load_checkpoint

    return load_checkpoint(path, model=trainer.model, optimizer=trainer.optimizer, scheduler=trainer.scheduler)


def seal_again(path: Path) -> None:
    """Vouch for a checkpoint's files as they are now."""
    (path / MANIFEST).unlink()
    seal(path, kind="checkpoint", counts={"iteration": 1})


def exchange(path: Path, name: str, content: bytes) -> None:
    """Put other bytes behind the tensors of a checkpoint's part, where its index has something of this name."""
    index = pickle.loads((path / ".metadata").read_bytes())
    place = next(place for key, place in index.storage_data.items() if name in key.fqn)
    with open(path / place.relative_path, "ab") as stream:
        place.offset, place.length = stream.tell(), stream.write(content)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def saved(value: Any) -> bytes:
    """What torch.save writes of it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def read_common(path: Path) -> Any:
    """What a checkpoint has beside its tensors."""
    if not NEWER:
        return torch.load(path / "common.pt", weights_only=True)
    index = pickle.loads((path / ".metadata").read_bytes())
    place = next(place for key, place in index.storage_data.items() if key.fqn == COMMON_OBJECT)
    data = (path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    return torch.load(io.BytesIO(data), weights_only=True)[0]


def write_common(path: Path, content: Any) -> None:
    """Put something else into its place; ``content``: what torch.save is given, or bytes."""
    if not isinstance(content, bytes):
        content = saved([content] if NEWER else content)
    if NEWER:
        exchange(path, COMMON_OBJECT, content)
    else:
        (path / "common.pt").write_bytes(content)


@contextmanager
def other_common(path: Path, content: Any) -> Iterator[None]:
    """Within it a checkpoint has that in its place, and is sealed with it."""
    file = path / (".metadata" if NEWER else "common.pt")
    before = file.read_bytes()
    write_common(path, content)
    seal_again(path)
    yield
    file.write_bytes(before)

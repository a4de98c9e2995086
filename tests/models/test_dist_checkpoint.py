"""Checkpoints read and written without megatron-core's own reader and writer, against them; what is refused by name."""

from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_npd.errors import UserError
from megatron_npd.manifest import is_sealed, seal
from megatron_npd.models.convert import hf_to_megatron, megatron_to_hf
from megatron_npd.models.dist_checkpoint import DistCheckpoint
from megatron_npd.models.families import FAMILIES
from megatron_npd.models.hf_checkpoint import HFCheckpoint
from megatron_npd.stoppable import Stopped, Worker
from tests.dist import run_distributed
from tests.helpers import make_tiny_model
from tests.models.common import make_trainer, restore, save

LAYOUTS = ((1, 1), (2, 1), (1, 2))  # TP, PP of two processes; the first one is data-parallel
MODELS: dict[str, dict[str, Any]] = {family.name: {"family": family.name} for family in FAMILIES.values()} | {
    "untied": {"family": "qwen2", "vocab_size": 303, "num_key_value_heads": 2, "tie_word_embeddings": False}
}


def make_and_load(rank: int, world: int, work: Path) -> None:
    """Each converted model in each layout: megatron-core loads what a model built from the directory itself has."""
    for tp, pp in LAYOUTS:
        for name in MODELS:
            expected = make_trainer(work / name, tp, pp).model
            trainer = make_trainer(work / name, tp, pp, load=False)
            restore(trainer, work / f"{name}-megatron" / "iter_0000000")
            for (key, got), (_, parameter) in zip(
                trainer.model.named_parameters(), expected.named_parameters(), strict=True
            ):
                assert torch.equal(got, parameter), (name, tp, pp, key)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("dist")
    for name, fields in MODELS.items():
        make_tiny_model(work / name, **fields)
        hf_to_megatron(work / name, work / f"{name}-megatron", verify=True)
    return work


def test_files_are_as_large_as_what_they_hold(work: Path) -> None:
    """torch.save writes all of a tensor's memory, not the tensor alone."""
    numbers = (work / "untied" / "model.safetensors").stat().st_size
    written = sum(file.stat().st_size for file in (work / "untied-megatron" / "iter_0000000").iterdir())
    assert written < numbers + 100_000


def test_megatron_core_loads_what_is_written_in_any_layout(work: Path) -> None:
    run_distributed(make_and_load, 2, work)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_byte_identical(work: Path, name: str) -> None:
    megatron_to_hf(work / f"{name}-megatron", work / name, work / f"{name}-back", verify=True)
    for file in (work / name).iterdir():
        assert (work / f"{name}-back" / file.name).read_bytes() == file.read_bytes(), file


def train(rank: int, world: int, work: Path) -> None:
    trainer = make_trainer(work / "untied", world // 2, sp=True)  # each rank has a part of the optimizer's state
    for iteration in range(2):
        trainer.step(iteration)
    save(trainer, work / f"trained-{world}", 2)
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, work / f"trained-{world}-{rank}.pt")


@pytest.mark.parametrize("world", [2, 4])
def test_a_checkpoint_with_optimizer_state_gives_the_weights(work: Path, world: int) -> None:
    run_distributed(train, world, work)
    megatron_to_hf(work / f"trained-{world}", work / "untied", work / f"trained-{world}-hf")
    got = load_file(work / f"trained-{world}-hf" / "model.safetensors")
    ranks = [torch.load(work / f"trained-{world}-{rank}.pt") for rank in range(world // 2)]  # of tensor parallelism
    embedding = torch.cat([part["module.embedding.word_embeddings.weight"] for part in ranks])[:303]
    assert torch.equal(got["model.embed_tokens.weight"], embedding)
    halves = [part["module.decoder.layers.1.mlp.linear_fc1.weight"].chunk(2) for part in ranks]
    for index, name in enumerate(("gate", "up")):
        expected = torch.cat([half[index] for half in halves])
        assert torch.equal(got[f"model.layers.1.mlp.{name}_proj.weight"], expected)
    down = torch.cat([part["module.decoder.layers.0.mlp.linear_fc2.weight"] for part in ranks], dim=1)
    assert torch.equal(got["model.layers.0.mlp.down_proj.weight"], down)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_hidden_layers": 3}, "must hold this model, got decoder.layers.input_layernorm.weight of shape"),
        ({"num_hidden_layers": 1}, "of 2 layers where config.json has 1"),
        ({"intermediate_size": 64}, "must hold this model, got decoder.layers.mlp.linear_fc1.weight of shape"),
        ({"tie_word_embeddings": False}, "must hold this model, got no output_layer.weight"),
        ({"family": "llama", "num_key_value_heads": 1}, "got decoder.layers.self_attention.linear_qkv.bias too"),
    ],
)
def test_another_model_is_refused(work: Path, tmp_path: Path, other: dict[str, Any], words: str) -> None:
    make_tiny_model(tmp_path / "model", **{"family": "qwen2", **other})
    with pytest.raises(UserError, match=words):
        megatron_to_hf(work / "qwen2-megatron", tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def copy_of(work: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint to change, and its index."""
    path = shutil.copytree(work / "qwen2-megatron" / "iter_0000000", tmp_path / "iter_0000000")
    return path, pickle.loads((path / ".metadata").read_bytes())


def seal_again(path: Path, index: Any = None) -> None:
    if index is not None:
        (path / ".metadata").write_bytes(pickle.dumps(index))
    (path / "manifest.json").unlink()
    seal(path, kind="checkpoint")


def test_a_damaged_or_foreign_file_is_refused(work: Path, tmp_path: Path) -> None:
    path, _ = copy_of(work, tmp_path)
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(data)
    with pytest.raises(UserError, match=r"__0_0\.distcp must have sha256"):
        megatron_to_hf(path, work / "qwen2", tmp_path / "out")
    data[len(data) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(data)
    (path / "more.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"must hold what its manifest\.json lists, got more\.distcp too"):
        megatron_to_hf(path, work / "qwen2", tmp_path / "out")
    (path / "more.distcp").unlink()
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="must be a sealed directory"):
        megatron_to_hf(path, work / "qwen2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_their_name(work: Path, tmp_path: Path, value: float) -> None:
    path, _ = copy_of(work, tmp_path)
    checkpoint = DistCheckpoint(path, ["__0_0.distcp"])
    stored = checkpoint.find("decoder.layers.1.mlp.linear_fc2.weight", (64, 96))
    _, start = checkpoint._place(stored, stored.pieces[0])
    with open(path / "__0_0.distcp", "r+b") as stream:
        stream.seek(start + 4 * 96 * 40)
        stream.write(torch.tensor([value]).numpy().tobytes())
    seal_again(path)
    words = r"model\.layers\.1\.mlp\.down_proj\.weight of the model to export into .*out must hold finite numbers"
    with pytest.raises(UserError, match=words):
        megatron_to_hf(path, work / "qwen2", tmp_path / "out")
    assert not is_sealed(tmp_path / "out")


def save_piece(path: Path, index: Any, tensor: torch.Tensor, **options: Any) -> None:
    """Put a tensor in the place of a piece."""
    place = next(at for key, at in index.storage_data.items() if key.fqn == "embedding.word_embeddings.weight")
    with open(path / place.relative_path, "ab") as stream:
        place.offset = stream.tell()
        torch.save(tensor, stream, **options)
        place.length = stream.tell() - place.offset


def test_pieces_that_lie_otherwise_are_refused(work: Path, tmp_path: Path) -> None:
    """What a reader of bytes would misread; of two pieces, one is not where the index has it."""
    for number, wrong in enumerate((torch.zeros(64, 304).T, torch.zeros(304, 64).half(), torch.zeros(303, 64))):
        path, index = copy_of(work, tmp_path / str(number))
        save_piece(path, index, wrong)
        seal_again(path, index)
        with pytest.raises(UserError, match=r"__0_0\.distcp must be as save_checkpoint wrote it, got"):
            megatron_to_hf(path, work / "qwen2", tmp_path / "out")
    path, index = copy_of(work, tmp_path / "cut")
    next(iter(index.storage_data.values())).length -= 40
    seal_again(path, index)
    with pytest.raises(UserError, match=r"__0_0\.distcp must be as save_checkpoint wrote it, got BadZipFile"):
        megatron_to_hf(path, work / "qwen2", tmp_path / "out")
    path, index = copy_of(work, tmp_path / "lost")
    index.storage_data.popitem()
    seal_again(path, index)
    with pytest.raises(UserError, match=r"\.metadata must be as save_checkpoint wrote it, got no place for a piece"):
        megatron_to_hf(path, work / "qwen2", tmp_path / "out")


def test_a_view_of_more_numbers_is_read_where_it_begins(work: Path, tmp_path: Path) -> None:
    path, index = copy_of(work, tmp_path)
    embedding = load_file(work / "qwen2" / "model.safetensors")["model.embed_tokens.weight"]
    save_piece(path, index, torch.cat([torch.ones(5, 64), embedding, torch.ones(1, 64)])[5:309])
    seal_again(path, index)
    megatron_to_hf(path, work / "qwen2", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (work / "qwen2" / "model.safetensors").read_bytes()


def test_a_thread_that_is_asked_to_stop_leaves_nothing_sealed(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the command can be given again."""
    reading, go_on = threading.Event(), threading.Event()
    real = DistCheckpoint.read

    def read(*args: Any) -> None:
        reading.set()
        assert go_on.wait(60)
        real(*args)

    job = (work / "qwen2-megatron", work / "qwen2", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(DistCheckpoint, "read", read)
        worker = Worker(lambda: megatron_to_hf(*job), threading.Event())
        assert reading.wait(60)
        worker.stop = True
        go_on.set()
        worker.join(60)
    assert isinstance(worker.error, Stopped) and not is_sealed(tmp_path / "out")
    megatron_to_hf(*job)


def test_a_full_disk_is_an_error_of_the_system(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says of it only that a write failed."""
    import errno

    from megatron_npd.models import streams

    class Full:
        def __init__(self, *_: Any) -> None:
            pass

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    opened = streams.HashedFile.__init__

    def full(self: Any, path: Path) -> None:
        opened(self, path)
        self._stream.close()
        self._stream = Full()

    monkeypatch.setattr(streams.HashedFile, "__init__", full)
    for convert in (
        lambda: hf_to_megatron(work / "qwen2", tmp_path / "megatron"),
        lambda: megatron_to_hf(work / "qwen2-megatron", work / "qwen2", tmp_path / "hf"),
    ):
        with pytest.raises(OSError, match="No space left on device") as caught:
            convert()
        assert caught.value.errno == errno.ENOSPC and caught.value.filename


def test_types_can_be_chosen(work: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf_to_megatron(work / "qwen2", tmp_path / "megatron", dtype="bfloat16", verify=True)
    megatron_to_hf(tmp_path / "megatron", work / "qwen2", tmp_path / "half", dtype="float16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").state_dict()
    for name, tensor in load_file(work / "qwen2" / "model.safetensors").items():
        assert torch.equal(loaded[name], tensor.bfloat16().half()), name
    assert set(HFCheckpoint(tmp_path / "half").dtypes.values()) == {torch.float16}


def write_as_megatron_lm(model: Path, root: Path, *, stacked: bool) -> Path:
    """A checkpoint with Transformer Engine's names, by torch's own writer; returns its directory."""
    from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

    hf = load_file(model / "model.safetensors")
    state: dict[str, list[torch.Tensor]] = {}
    for index in range(2):
        layer = {name.removeprefix(f"model.layers.{index}."): tensor for name, tensor in hf.items()}
        q, k, v = (
            [layer[f"self_attn.{part}_proj.{kind}"].chunk(2) for kind in ("weight", "bias")] for part in ("q", "k", "v")
        )
        parts = {
            "self_attention.linear_qkv.layer_norm_weight": layer["input_layernorm.weight"],
            "self_attention.linear_proj.weight": layer["self_attn.o_proj.weight"],
            "mlp.linear_fc1.layer_norm_weight": layer["post_attention_layernorm.weight"],
            "mlp.linear_fc1.weight": torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]),
            "mlp.linear_fc2.weight": layer["mlp.down_proj.weight"],
        }
        for number, kind in enumerate(("weight", "bias")):
            groups = zip(q[number], k[number], v[number], strict=True)
            parts[f"self_attention.linear_qkv.{kind}"] = torch.cat([part for group in groups for part in group])
        for name, tensor in parts.items():
            key = f"decoder.layers.{name}" if stacked else f"decoder.layers.{index}.{name}"
            state.setdefault(key, []).append(tensor)
    tensors = {key: torch.stack(layers) if stacked else layers[0] for key, layers in state.items()}
    tensors["embedding.word_embeddings.weight"] = torch.cat([hf["model.embed_tokens.weight"], torch.zeros(81, 64)])
    tensors["output_layer.weight"] = torch.cat([hf["lm_head.weight"], torch.zeros(81, 64)])
    tensors["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    others: dict[str, Any] = {f"optimizer.state.exp_avg.{key}": tensor for key, tensor in tensors.items()}
    path = root / "iter_0000120"
    save_distributed({**tensors, **others, "rng_state/shard_0_1": [1, 2]}, checkpoint_id=path, no_dist=True)
    (root / "latest_checkpointed_iteration.txt").write_text("120\n")
    return path


@pytest.mark.parametrize("stacked", [True, False])
def test_megatron_lm_s_own_checkpoints_are_read(work: Path, tmp_path: Path, stacked: bool) -> None:
    from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata

    path = write_as_megatron_lm(work / "untied", tmp_path, stacked=stacked)
    megatron_to_hf(tmp_path, work / "untied", tmp_path / "out", verify=True)  # the root, as Megatron-LM leaves it
    expected = (work / "untied" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
    old, new = MCoreMetadata(), pickle.loads((path / ".metadata").read_bytes())  # as megatron-core had it until 0.15
    old.__dict__.update(new.__dict__, mcore_data={})
    (path / ".metadata").write_bytes(pickle.dumps(old))
    megatron_to_hf(path, work / "untied", tmp_path / "older")
    assert (tmp_path / "older" / "model.safetensors").read_bytes() == expected
    (path / "state.json").write_text("{}")  # one of ours, that was never sealed
    with pytest.raises(UserError, match="must be a sealed directory"):
        megatron_to_hf(path, work / "untied", tmp_path / "unsealed")


def test_the_table_says_where_every_tensor_goes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_npd.cli.convert import main

    model = str(work / "untied")
    main(["--direction", "hf-to-megatron", "--hf-model", model, "--dry-run", "--dtype", "bfloat16"])
    there = capsys.readouterr().out.splitlines()
    checkpoint = str(work / "untied-megatron")
    main(["--direction", "megatron-to-hf", "--hf-model", model, "--checkpoint", checkpoint, "--dry-run"])
    back = capsys.readouterr().out.splitlines()
    names = set(load_file(work / "untied" / "model.safetensors"))
    for lines in (there, back):
        assert {line.split()[0] for line in lines[1:]} == names
    k_proj = "model.layers.1.self_attn.k_proj.weight"
    line = next(" ".join(line.split()) for line in there if k_proj in line)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert line == f"{k_proj} {name} 32:64, 128:160 64 x 64 float32 -> bfloat16"
    line = next(" ".join(line.split()) for line in back if k_proj in line)
    assert line == f"{k_proj} decoder.layers.self_attention.linear_qkv.weight[1] 32:64, 128:160 64 x 64 float32"


@pytest.mark.parametrize(
    ("flags", "words"),
    [((), "out must be given, or dry_run"), (("--out", "o", "--workers=-1"), "workers must be at least 0")],
)
def test_flags_that_do_not_go_together_are_refused(flags: tuple[str, ...], words: str) -> None:
    from megatron_npd.cli.convert import main

    with pytest.raises(UserError, match=words):
        main(["--direction", "hf-to-megatron", "--hf-model", "model", *flags])


def test_what_was_written_otherwise_is_found(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By reading it back: the numbers are flipped between the hash and the disk."""
    from megatron_npd.models import convert

    real = convert.write_weights

    def flipped(directory: Path, *args: Any, **options: Any) -> Any:
        result = real(directory, *args, **options)
        with open(directory / "model.safetensors", "r+b") as stream:
            stream.seek(-1, 2)
            last = stream.read(1)[0]
            stream.seek(-1, 2)
            stream.write(bytes([last ^ 1]))
        return result

    monkeypatch.setattr(convert, "write_weights", flipped)
    with pytest.raises(UserError, match="must be as its source has it, got other numbers"):
        megatron_to_hf(work / "qwen2-megatron", work / "qwen2", tmp_path / "out", verify=True)
    assert not is_sealed(tmp_path / "out")

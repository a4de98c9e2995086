"""What the weights of an export give for the tokens of ``megatron_npd/probe.py``: a forward by transformers, in layers.

Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_npd.models.hf_checkpoint import HFCheckpoint
from megatron_npd.probe import PROBED, probe_ids
from megatron_npd.stoppable import check_stop
from megatron_npd.weights import EMBEDDING, HEAD

MOST_BYTES = 40 * 10**9  # of weights: each is read once more, from the page cache, and multiplied by 16 rows
_HEAD_ROWS = 2**14  # of the output layer in memory at a time


def known_logprobs(directory: str | Path, vocab_size: int) -> dict[str, Any] | None:
    """What a policy's manifest keeps of the tokens: ``ids``, ``logprobs`` and ``dtype``.

    Computed in float32 by transformers' own layers, of which one has its weights at a time: memory is that of a layer,
    not of the model.

    Args:
        directory: Hugging Face directory with its weights.
        vocab_size: Of the model.

    Returns:
        None where a number overflows, or the weights are so large that this would take minutes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint, ids = HFCheckpoint(directory), probe_ids(vocab_size)
    sizes = [torch.Size(shape).numel() * checkpoint.dtypes[name].itemsize for name, shape in checkpoint.shapes.items()]
    if sum(sizes) > MOST_BYTES:
        return None
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval().model
    with torch.no_grad():
        hidden_1TH = torch.stack([checkpoint.read(EMBEDDING, (slice(token, token + 1),))[0] for token in ids])[None]
        hidden_1TH = hidden_1TH.float()
        rotary = type(model.rotary_emb)(config)(hidden_1TH, torch.arange(PROBED)[None])
        for index, layer in enumerate(model.layers):
            check_stop()
            _fill(layer, checkpoint, f"model.layers.{index}.")
            hidden_1TH = layer(hidden_1TH, position_embeddings=rotary, attention_mask=None)
            layer.to("meta")
        _fill(model.norm, checkpoint, "model.norm.")
        hidden_TH = model.norm(hidden_1TH)[0, :-1]
        head = HEAD if HEAD in checkpoint.shapes else EMBEDDING
        starts = range(0, vocab_size, _HEAD_ROWS)
        rows = (checkpoint.read(head, (slice(at, min(at + _HEAD_ROWS, vocab_size)),)).float() for at in starts)
        logprobs_TV = torch.log_softmax(torch.cat([hidden_TH @ part_VH.T for part_VH in rows], dim=-1), dim=-1)
    logprobs_T = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    if not logprobs_T.isfinite().all():
        return None
    narrow = {str(dtype) for dtype in checkpoint.dtypes.values()} - {str(torch.float32)}
    dtype = min(narrow, default=str(torch.float32))  # servers compute in it, and round more
    return {"ids": ids, "logprobs": [round(value, 5) for value in logprobs_T.tolist()], "dtype": dtype}


def _fill(module: nn.Module, checkpoint: HFCheckpoint, prefix: str) -> None:
    """Give a module, which is on no device, its weights."""
    module.load_state_dict({name: _read(checkpoint, prefix + name) for name in module.state_dict()}, assign=True)


def _read(checkpoint: HFCheckpoint, name: str) -> torch.Tensor:
    """A tensor in float32; transformers keeps those of a layer's experts as one."""
    if name in checkpoint.shapes or ".experts." not in name:
        return checkpoint.read(name).float()
    prefix, _, kind = name.rpartition("experts.")
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    experts = []
    while f"{prefix}experts.{len(experts)}.{parts[0]}.weight" in checkpoint.shapes:
        own = [checkpoint.read(f"{prefix}experts.{len(experts)}.{part}.weight").float() for part in parts]
        experts.append(torch.cat(own))
    return torch.stack(experts)

"""Conversion, Hugging Face <-> Megatron: time and memory beside a copy and a sha256 of the same bytes, of two sizes.

    python benchmarks/convert.py                     1 and 4 GB: 13 GB of disk, removed at the end
    python benchmarks/convert.py --gigabytes 1 --repeat 3

Models have the widths of Qwen2.5-1.5B, bfloat16, and as many layers as the size asks for, with random weights. Every
measurement is a process of its own, after its imports; the copy is flushed to the disk as the conversion's files are.
CPU seconds are those of all threads, as on a machine that others use the time says less. Memory is the peak of the
resident memory above what the process held before; the limit is two layers and the largest tensor. A
checkpoint's hashes are checked first, unless a process of the same tree knows them, as in a run
("hashes known").
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import peak_bytes

from megatron_npd.durable import fsync_path
from megatron_npd.log import run_main
from megatron_npd.manifest import file_sha256, read_manifest

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
Result = tuple[float, float, int]  # seconds, CPU seconds of all threads, bytes of memory


def make_model(path: Path, total_bytes: float) -> tuple[int, int]:
    """Write a model of about as many bytes; returns the bytes of a layer and of the embedding."""
    from megatron_npd.models.families import load_spec
    from megatron_npd.models.hf_checkpoint import write_weights
    from megatron_npd.models.mapping import hf_shapes

    path.mkdir()

    def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
        (path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        return hf_shapes(load_spec(path))

    def size(layers: int) -> int:
        return sum(2 * torch.Size(shape).numel() for shape in shapes_of(layers).values())

    layer = size(2) - size(1)
    shapes = shapes_of(round((total_bytes - size(1)) / layer) + 1)
    write_weights(
        path,
        shapes,
        dict.fromkeys(shapes, torch.bfloat16),
        lambda block, tensor: tensor.normal_(),
        max_shard_bytes=5 * 10**9,
        workers=2,
    )
    return layer, 2 * torch.Size(shapes["model.embed_tokens.weight"]).numel()


def copy_and_hash(source: Path, target: Path) -> None:
    """Copy the large files of a directory, flush the copies and hash them."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".distcp"):
            shutil.copyfile(file, target / file.name)
            fsync_path(target / file.name)
            file_sha256(target / file.name)


def to_megatron(source: Path, target: Path) -> None:
    from megatron_npd.models.convert import hf_to_megatron

    hf_to_megatron(source, target)


def to_hf(source: Path, target: Path) -> None:
    from megatron_npd.models.convert import megatron_to_hf

    megatron_to_hf(source, source.parent.parent / "hf", target)


def to_hf_unknown(source: Path, target: Path) -> None:
    os.environ.pop("MEGATRON_NPD_VERIFIED", None)
    to_hf(source, target)


def measured(action: Callable[[Path, Path], None], source: Path, target: Path, results: Any) -> None:
    """In a process of its own: seconds and bytes of an action, what it wrote removed."""
    import megatron_npd.models.convert  # noqa: F401  (outside the clock)

    start, start_cpu = time.perf_counter(), time.process_time()
    memory = peak_bytes(lambda: action(source, target), "cpu")
    results.put((time.perf_counter() - start, time.process_time() - start_cpu, memory))


def run(action: Callable[[Path, Path], None], source: Path, target: Path, *, keep: bool = False) -> Result:
    """Measure an action in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measured, args=(action, source, target, results))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{action.__name__} failed; see above"
    if not keep:
        shutil.rmtree(target)
    return results.get()


def measure(root: Path, gigabytes: float, repeat: int) -> None:
    layer, embedding = make_model(root / "hf", gigabytes * 1e9)
    checkpoint = root / "megatron" / "iter_0000000"
    files = sum(file.stat().st_size for file in (root / "hf").glob("*.safetensors"))
    limit = 2 * layer + embedding
    run(to_megatron, root / "hf", root / "megatron", keep=True)
    read_manifest(checkpoint)  # processes that this one starts know the hashes
    best: dict[str, Result] = {}
    for _ in range(repeat):
        for name, action, source in (
            ("copy + sha256", copy_and_hash, root / "hf"),
            ("HF -> Megatron", to_megatron, root / "hf"),
            ("Megatron -> HF", to_hf_unknown, checkpoint),
            ("Megatron -> HF, hashes known", to_hf, checkpoint),
        ):
            result = run(action, source, root / "out")
            best[name] = min(best.get(name, result), result)
    print(f"{files / 1e9:.2f} GB, {os.cpu_count()} cores; limits 1.2 x and {limit / 1e6:.0f} MB")
    rival = best["copy + sha256"]
    for name, (seconds, cpu, memory) in best.items():
        print(
            f"  {name:30} {seconds:6.2f} s  {seconds / rival[0]:5.2f} x  of CPU {cpu:6.2f} s  {cpu / rival[1]:5.2f} x"
            f"  {memory / 1e6:6.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), gigabytes, options.repeat)


if __name__ == "__main__":
    run_main(main)

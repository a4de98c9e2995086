"""Packing: kept samples into training rows, as an index over the store.

Packs are a sealed directory of kind ``packs`` with ``packs.arrow`` (``records.PACK_SCHEMA``), byte-identical as a
function of its inputs. What nobody scores goes the same way: a store without teacher records (``store/unscored.py``),
then packs over it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config.settings import PackConfig
from megatron_npd.data.row_schedule import PACKS_KIND
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, read_manifest, seal, sealed_from, writing
from megatron_npd.quarantine import write_quarantine
from megatron_npd.records import PACK_SCHEMA, PACKS_FILE, SELECTION_FILE
from megatron_npd.store.annotation_store import AnnotationStore
from megatron_npd.store.unscored import store_prompts, store_rollouts


def pack_lengths(
    lengths_N: npt.ArrayLike, seq_length: int, align: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Best-fit decreasing: longest first, each into the fullest row that still has room; deterministic.

    Equal lengths and equally full rows are handled as groups, found through one integer used as a bitset of the
    spaces that some row has left, so that the work grows with the number of distinct (length, space) pairs.

    Args:
        lengths_N: Tokens of each sample, 1 .. ``seq_length``.
        seq_length: Tokens of a row, a multiple of ``align``.
        align: Segments start at multiples of it.

    Returns:
        Row and offset of each sample, int32 [N] each.
    """
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    assert seq_length % align == 0 and (not lengths_N.size or 1 <= lengths_N.min() <= lengths_N.max() <= seq_length)
    capacity = seq_length // align  # from here on, all lengths count in units of align
    sizes_N = -(-lengths_N // align)
    key = (capacity - sizes_N).astype(np.uint16 if capacity < 2**16 else np.int64)  # 16 bits: a radix sort
    order_N = np.argsort(key, kind="stable")
    counts = np.bincount(sizes_N, minlength=1)
    rows_with: list[list[tuple[int, int]]] = [[] for _ in range(capacity + 1)]  # space -> (first row, rows)
    spaces = 0  # bit s: some row has s left
    opened = 0
    moves: list[tuple[int, int, int, int, int]] = []  # samples placed, first row, samples per row, space before, size
    for size in np.nonzero(counts)[0][::-1].tolist():
        left = int(counts[size])
        while left:
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                first, rows = rows_with[space].pop()
                if not rows_with[space]:
                    spaces ^= 1 << space
            else:
                space, first = capacity, opened
                rows = -(-left // (capacity // size))
                opened += rows
            # A row that takes one is then the fullest that fits: it takes as many of this size as it can.
            per_row = space // size
            full = min(rows, left // per_row)
            taken = [(full, per_row)] if full else []
            if full < rows and left > full * per_row:
                taken.append((1, left - full * per_row))
            untouched = rows
            for number, each in taken:
                moves.append((number * each, first, each, space, size))
                rest = space - each * size
                rows_with[rest].append((first, number))
                spaces |= (1 << rest) & ~1  # rows without space are done
                first, untouched, left = first + number, untouched - number, left - number * each
            if untouched:
                rows_with[space].append((first, untouched))
                spaces |= 1 << space
    rows_N, offsets_N = np.empty(len(lengths_N), np.int32), np.empty(len(lengths_N), np.int32)
    placed, first, each, space, size = np.array(moves, dtype=np.int64).reshape(-1, 5).T
    within_N = np.arange(len(lengths_N)) - np.repeat(np.cumsum(placed) - placed, placed)
    each_N = np.repeat(each, placed)
    rows_N[order_N] = np.repeat(first, placed) + within_N // each_N
    offsets_N[order_N] = align * (capacity - np.repeat(space, placed) + within_N % each_N * np.repeat(size, placed))
    return rows_N, offsets_N


def pack_selection(
    annotations_dir: str | Path, selection_dir: str | Path | None, out_dir: str | Path, cfg: PackConfig
) -> Manifest:
    """Pack the kept samples of a selection and seal ``out_dir``; a directory sealed from the same input is left.

    Args:
        annotations_dir: The store.
        selection_dir: Sealed directory of kind ``selection``, made from that store; None: all its samples are packed,
            each with the weight of the identical responses that it stands for.
        out_dir: Directory to seal with kind ``packs``.
        cfg: Row length, alignment, and what becomes of longer samples.

    Returns:
        The manifest. Counts: the books over the kept samples (``too_long`` are quarantined), how many of them are
        ``truncated``, ``rows``, ``tokens`` and ``fill``, the share of the rows' tokens that is no padding.

    Raises:
        UserError: The selection is of another store, nothing is left to pack, or ``out_dir`` is sealed from others.
    """
    store = AnnotationStore(annotations_dir)
    if selection_dir is None:
        return _pack_all(store, out_dir, cfg)
    origin = read_manifest(selection_dir, kind="selection").provenance.get("annotations_sha256")
    table = pq.read_table(Path(selection_dir) / SELECTION_FILE, columns=["kept", "weight"])
    if origin != file_sha256(store.path / MANIFEST) or len(table) != len(store):
        raise UserError(
            f"{selection_dir} must be selected from {annotations_dir} as it is now, got another; remove it and select "
            "again"
        )
    source = {"selection_sha256": file_sha256(Path(selection_dir) / MANIFEST)}
    kept_M = np.nonzero(table["kept"].to_numpy())[0]
    return _write_packs(store, kept_M, Path(out_dir), cfg, source, table["weight"].to_numpy())


def pack_prompts(prompts_dir: str | Path, out_dir: str | Path, cfg: PackConfig, *, vocab_size: int) -> Manifest:
    """Pack prompts with their responses for supervised training.

    Writes ``out_dir/store`` (``top_k`` 0; prompts without a response are quarantined) and
    ``out_dir/packs``; what is sealed from the same input is left.

    Args:
        prompts_dir: Sealed directory of kind ``prompts``.
        out_dir: Parent of both directories.
        cfg: Row length and alignment.
        vocab_size: V* of the model that will train.

    Returns:
        The manifest of ``out_dir/packs``.

    Raises:
        UserError: No prompt has a response, a token id is not the model's, or a directory is sealed from others.
    """
    out_dir = Path(out_dir)
    store_prompts(prompts_dir, out_dir / "store", vocab_size=vocab_size)
    return _pack_all(AnnotationStore(out_dir / "store"), out_dir / "packs", cfg)


def pack_rollouts(
    rollouts_dir: str | Path, out_dir: str | Path, cfg: PackConfig, *, vocab_size: int, max_quarantined: float = 0.1
) -> Manifest:
    """Pack a round of responses that nobody scores, for SFT and SeqKD.

    Writes ``out_dir/store`` (``top_k`` 0, with the generator's log-probabilities) and ``out_dir/packs``; what is sealed
    from the same input is left.

    Args:
        rollouts_dir: Sealed directory of kind ``rollouts``.
        out_dir: Parent of both directories.
        cfg: Row length and alignment.
        vocab_size: V* of the model that will train.
        max_quarantined: Share of the responses that may be quarantined.

    Returns:
        The manifest of ``out_dir/packs``.

    Raises:
        UserError: As ``store.unscored.store_rollouts``, or nothing is left to pack.
    """
    out_dir = Path(out_dir)
    store_rollouts(rollouts_dir, out_dir / "store", vocab_size=vocab_size, max_quarantined=max_quarantined)
    return _pack_all(AnnotationStore(out_dir / "store"), out_dir / "packs", cfg)


def _pack_all(store: AnnotationStore, out_dir: str | Path, cfg: PackConfig) -> Manifest:
    """Pack all samples of a store; a sample weighs as many as the identical responses it stands for, 1 on average."""
    parts = [part["copies"].to_numpy() for part in store.parts("copies")]
    copies_N = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.float64)
    lens_N = store.response_lens
    weights_N = copies_N * (lens_N.sum() / max((copies_N * lens_N).sum(), 1))
    return _write_packs(store, np.arange(len(store)), Path(out_dir), cfg, {}, weights_N.astype(np.float32))


def _write_packs(
    store: AnnotationStore,
    kept_M: npt.NDArray[np.int64],
    out_dir: Path,
    cfg: PackConfig,
    source: Mapping[str, str],
    weights_N: npt.NDArray[np.float32],
) -> Manifest:
    provenance = {
        "seq_length": cfg.seq_length,
        "segment_align": cfg.segment_align,
        "too_long": cfg.too_long,
        "store": os.path.relpath(store.path.resolve(), out_dir.resolve()),
        "store_sha256": file_sha256(store.path / MANIFEST),
        "top_k": store.top_k,
        "vocab_size": store.vocab_size,
        "round": store.round,
        "policy_version": store.policy_version,
        **source,
    }
    if manifest := sealed_from(out_dir, kind=PACKS_KIND, provenance=provenance):
        return manifest
    lengths_M = (store.prompt_lens + store.response_lens)[kept_M]
    fits_M = lengths_M <= cfg.seq_length
    truncated = 0
    if cfg.too_long == "truncate":
        begun_M = store.prompt_lens[kept_M] < cfg.seq_length
        truncated = int((begun_M & ~fits_M).sum())
        lengths_M, fits_M = np.minimum(lengths_M, cfg.seq_length), begun_M
    samples, lengths, too_long = kept_M[fits_M], lengths_M[fits_M], kept_M[~fits_M]
    if not len(samples):
        raise UserError(
            f"{store.path} must leave samples to pack, got {len(kept_M)} kept of {len(store)}, {len(too_long)} of them "
            f"longer than seq_length {cfg.seq_length}; remove the selection and select with looser bounds, or raise "
            "seq_length"
        )
    rows, offsets = pack_lengths(lengths, cfg.seq_length, cfg.segment_align)
    num_rows = int(rows.max()) + 1
    counts = {
        "in": len(kept_M),
        "kept": len(samples),
        "quarantined": {"too_long": len(too_long)} if len(too_long) else {},
        "pending": 0,
        "truncated": truncated,
        "rows": num_rows,
        "tokens": int(lengths.sum(dtype=np.int64)),
        "fill": round(int(lengths.sum(dtype=np.int64)) / (num_rows * cfg.seq_length), 6),
    }
    order = np.lexsort((offsets, rows))
    rows, offsets, lengths, samples = (column[order] for column in (rows, offsets, lengths, samples))
    columns = [rows, offsets, lengths, store.prompt_lens[samples], samples, weights_N[samples]]
    batch = pa.record_batch([pa.array(column) for column in columns], schema=PACK_SCHEMA)
    with writing(out_dir) as directory:
        with open(directory / PACKS_FILE, "wb") as sink, pa.ipc.new_file(sink, PACK_SCHEMA) as writer:
            writer.write_batch(batch)
        if len(too_long):
            names = (name for _, table in store.rows(too_long, "sample_id") for name in table["sample_id"].to_pylist())
            write_quarantine(directory, ({"sample_id": name, "reason": "too_long"} for name in names))
        manifest = seal(directory, kind=PACKS_KIND, provenance=provenance, counts=counts)
    note = f"; {len(too_long)} longer than a row are left out" if len(too_long) else ""
    note += f"; {truncated} are cut at its end" if truncated else ""
    get_logger().info(
        "%d samples packed into %d rows of %d tokens, %.2f %% filled%s",
        len(samples),
        num_rows,
        cfg.seq_length,
        100 * counts["fill"],
        note,
    )
    return manifest

"""The selection stage: which of a round's answers train, and why the others do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config import SelectConfig
from megatron_npd.data.store import AnnotationStore
from megatron_npd.log import UserError, get_logger
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, seal, sealed_from, writing
from megatron_npd.records import SELECTION_FILE, SELECTION_SCHEMA
from megatron_npd.selection.ifd import delta_ifd, ifd
from megatron_npd.selection.metrics import FILTERS, ZONES, histogram, zones

SELECTION_KIND = "selection"
LEAST_KEPT_SHARE = 0.9


def select_round(
    annotations_dir: str | Path, out_dir: str | Path, cfg: SelectConfig, tau: float | None = None
) -> Manifest:
    """Sort a round's samples into zones by Delta-IFD, filter, and seal ``out_dir`` with kind ``selection``.

    Args:
        annotations_dir: The store.
        out_dir: Directory to seal; one sealed from the same input is left as it is.
        cfg: Filter and bounds.
        tau: Upper bound of the proximal zone, frozen by an earlier round; None: ``cfg.tau``, and where that is None
            too the ``cfg.tau_quantile`` of this round's Delta.

    Returns:
        The manifest. Counts: the books (every dropped sample under its reason), ``tau``, ``kept_share``, ``zones``
        (``{"count", "share"}`` each) and ``histogram``.

    Raises:
        UserError: The store is empty or has no defined Delta, or ``out_dir`` is sealed from other input.
    """
    store = AnnotationStore(annotations_dir)
    given = cfg.tau if tau is None else tau
    provenance = {
        "filter": cfg.filter,
        "lower": cfg.lower,
        "tau": given,
        "tau_quantile": cfg.tau_quantile if given is None else None,
        "annotations_sha256": file_sha256(store.path / MANIFEST),
        "round": store.round,
        "policy_version": store.policy_version,
    }
    if manifest := sealed_from(out_dir, kind=SELECTION_KIND, provenance=provenance):
        return manifest
    table = store.metadata("sample_id", "teacher_loss", "teacher_loss_alone", "student_loss", "student_loss_alone")
    ids, *losses = table.columns
    teacher_N, teacher_alone_N, student_N, student_alone_N = (column.to_numpy() for column in losses)
    ifd_teacher_N, ifd_student_N = ifd(teacher_N, teacher_alone_N), ifd(student_N, student_alone_N)
    delta_N = delta_ifd(ifd_teacher_N, ifd_student_N)
    defined = delta_N[~np.isnan(delta_N)]
    if not defined.size:
        raise UserError(f"{store.path} must hold a sample with a defined IFD, got none of {len(store)}; see its losses")
    bound = float(np.quantile(defined.astype(np.float64), cfg.tau_quantile)) if given is None else given
    zones_N = zones(delta_N, cfg.lower, bound)
    kept_N = FILTERS[cfg.filter](zones_N)
    reasons_N = np.where(kept_N, "", [ZONES[zone] for zone in zones_N.tolist()])
    reasons, numbers = np.unique(reasons_N[~kept_N], return_counts=True)
    in_zone = {zone: int((zones_N == zone).sum()) for zone in ZONES}
    counts = {
        "in": len(store),
        "kept": int(kept_N.sum()),
        "quarantined": dict(zip(reasons.tolist(), numbers.tolist(), strict=True)),
        "pending": 0,
        "kept_share": float(kept_N.mean()),
        "tau": bound,
        "lower": cfg.lower,
        "zones": {zone: {"count": count, "share": count / len(store)} for zone, count in in_zone.items()},
        "histogram": histogram(delta_N, cfg.lower, bound),
    }
    columns = [ids, _nullable(ifd_teacher_N), _nullable(ifd_student_N), _nullable(delta_N), zones_N, kept_N, reasons_N]
    arrays = [
        column.combine_chunks() if isinstance(column, pa.ChunkedArray) else pa.array(column) for column in columns
    ]
    with writing(out_dir) as directory:
        pq.write_table(pa.Table.from_arrays(arrays, schema=SELECTION_SCHEMA), directory / SELECTION_FILE)
        manifest = seal(directory, kind=SELECTION_KIND, provenance=provenance, counts=counts)
    _report(manifest, cfg)
    return manifest


def _nullable(values_N: npt.NDArray[np.float32]) -> pa.Array:
    return pa.array(values_N, mask=np.isnan(values_N))


def _report(manifest: Manifest, cfg: SelectConfig) -> None:
    counts = manifest.counts
    get_logger().info(
        "%d of %d samples kept (filter %s, %g <= Delta-IFD <= %g)",
        counts["kept"],
        counts["in"],
        cfg.filter,
        cfg.lower,
        counts["tau"],
    )
    if counts["kept_share"] < LEAST_KEPT_SHARE:
        dropped = ", ".join(f"{number} {reason}" for reason, number in counts["quarantined"].items())
        get_logger().warning(
            "only %.1f %% of the samples are kept (%s); the paper keeps about 96 %%. Where the teacher is near certain "
            "and the student right, Delta-IFD sits just under 0: consider a lower bound below 0 or filter none",
            100 * counts["kept_share"],
            dropped,
        )

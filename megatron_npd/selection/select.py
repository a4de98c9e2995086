"""The selection stage: which of a round's answers train, why the others do not, and how much each weighs.

Legend: N samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config import SelectConfig
from megatron_npd.data.store import AnnotationStore
from megatron_npd.log import UserError, get_logger
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, read_manifest, seal, sealed_from, writing
from megatron_npd.records import PROMPTS_FILE, SELECTION_FILE, SELECTION_SCHEMA
from megatron_npd.selection.metrics import FILTERS, ZONES, Floats, Zones, histogram, measures, sample_weights, zones

SELECTION_KIND = "selection"
LEAST_KEPT_SHARE = 0.9
CUT = "cut_by_length"
QUANTILES = (0.9, 0.95, 0.98, 0.988, 0.995, 1.0)
LOSSES = ("teacher_loss", "teacher_loss_alone", "student_loss", "student_loss_alone")

Taus = Mapping[str, float]  # domain -> tau; "" is that of all samples, and of domains that have none


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """What a selection decides by, in the store's order."""

    store: AnnotationStore
    table: pa.Table  # sample_id, prompt_id, finish_reason, copies and LOSSES
    measures: dict[str, Floats]
    cut_N: npt.NDArray[np.bool_]
    domains_N: npt.NDArray[np.str_] | None

    @classmethod
    def read(cls, store: AnnotationStore, prompts_dir: str | Path | None, cfg: SelectConfig) -> _Samples:
        table = store.metadata("sample_id", "prompt_id", "finish_reason", "copies", *LOSSES)
        losses = {name: table[name].to_numpy() for name in LOSSES}
        domains_N = None
        if cfg.domain_column:
            domains_N = _domains(table["prompt_id"], prompts_dir, cfg.domain_column)
        return cls(
            store=store,
            table=table,
            measures=measures(losses),
            cut_N=table["finish_reason"].to_numpy() == "length",
            domains_N=domains_N,
        )

    def taus(self, cfg: SelectConfig) -> dict[str, float]:
        """tau as the configuration's quantile, of all samples and of each domain."""
        measure_N = self.measures[FILTERS[cfg.filter].measure].astype(np.float64)
        defined_N = ~np.isnan(measure_N)
        if not defined_N.any():
            raise UserError(
                f"{self.store.path} must hold a sample with a defined IFD, got none of {len(self.store)}; see its "
                "losses"
            )
        taus = {"": float(np.quantile(measure_N[defined_N], cfg.tau_quantile))}
        if self.domains_N is not None:
            for domain in np.unique(self.domains_N[defined_N]).tolist():
                taus[domain] = float(np.quantile(measure_N[defined_N & (self.domains_N == domain)], cfg.tau_quantile))
        return taus

    def decide(self, cfg: SelectConfig, taus: Taus) -> tuple[Zones, npt.NDArray[np.bool_], npt.NDArray[np.str_]]:
        """Zone, whether it trains, and the reason against it, of each sample."""
        chosen = FILTERS[cfg.filter]
        tau: float | npt.NDArray[np.float64] = taus[""]
        if self.domains_N is not None:
            names, places_N = np.unique(self.domains_N, return_inverse=True)
            tau = np.array([taus.get(name, taus[""]) for name in names.tolist()])[places_N]
        zones_N = zones(self.measures[chosen.measure], cfg.lower, tau)
        kept_N = chosen.keeps(zones_N)
        reasons_N = np.where(kept_N, "", np.array([ZONES[zone] for zone in zones_N.tolist()], dtype=object))
        if cfg.cut_by_length == "drop":
            reasons_N[kept_N & self.cut_N] = CUT
            kept_N &= ~self.cut_N
        return zones_N, kept_N, reasons_N

    def weights(self, cfg: SelectConfig, kept_N: npt.NDArray[np.bool_]) -> Floats:
        """Weight of each sample's loss."""
        prompts_N = factor_N = None
        if cfg.prompt_weights:
            prompts_N = self.table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
        if FILTERS[cfg.filter].by_perplexity:
            factor_N = np.exp(-self.table["teacher_loss"].to_numpy().astype(np.float64))
        copies_N = self.table["copies"].to_numpy()
        return sample_weights(
            kept_N, self.store.response_lens, copies_N=copies_N, prompts_N=prompts_N, factor_N=factor_N
        )


def select_round(
    annotations_dir: str | Path,
    out_dir: str | Path,
    cfg: SelectConfig,
    taus: Taus | None = None,
    *,
    prompts_dir: str | Path | None = None,
) -> Manifest:
    """Sort a round's samples into zones, filter, and seal ``out_dir`` with kind ``selection``.

    Args:
        annotations_dir: The store.
        out_dir: Directory to seal; one sealed from the same input is left as it is.
        cfg: Filter, bounds and weights.
        taus: Upper bounds frozen by an earlier round (``frozen_taus``); None: ``cfg.tau``, and where that is None too
            the ``cfg.tau_quantile`` of this round.
        prompts_dir: Sealed prompts that hold ``cfg.domain_column``; needed with it.

    Returns:
        The manifest. Counts: the books (every dropped sample under its reason), ``tau``, ``taus``, ``kept_share``,
        ``cut`` (answers cut by length, kept or not), ``zones`` (``{"count", "share"}`` each) and ``histogram``.

    Raises:
        UserError: The store is empty or has no defined measure, a prompt lacks its domain, or ``out_dir`` is sealed
            from other input.
    """
    given = {"": cfg.tau} if taus is None and cfg.tau is not None else taus
    store = AnnotationStore(annotations_dir)
    provenance = {
        "filter": cfg.filter,
        "lower": cfg.lower,
        "taus": None if given is None else dict(given),
        "tau_quantile": cfg.tau_quantile if given is None else None,
        "domain_column": cfg.domain_column,
        "cut_by_length": cfg.cut_by_length,
        "prompt_weights": cfg.prompt_weights,
        "annotations_sha256": file_sha256(store.path / MANIFEST),
        "round": store.round,
        "policy_version": store.policy_version,
    }
    if manifest := sealed_from(out_dir, kind=SELECTION_KIND, provenance=provenance):
        return manifest
    samples = _Samples.read(store, prompts_dir, cfg)
    quantiles = samples.taus(cfg)  # refuses a round without a defined measure, whatever the bounds
    taus = quantiles if given is None else given
    zones_N, kept_N, reasons_N = samples.decide(cfg, taus)
    weights_N = samples.weights(cfg, kept_N)
    counts = _counts(samples, cfg, taus, zones_N, kept_N, reasons_N)
    columns = [
        samples.table["sample_id"].combine_chunks(),
        *(_nullable(samples.measures[name]) for name in ("ifd_teacher", "ifd_student", "delta")),
        *(pa.array(column) for column in (zones_N, samples.cut_N, kept_N)),
        pa.array(reasons_N, pa.string()),
        pa.array(weights_N),
    ]
    with writing(out_dir) as directory:
        pq.write_table(pa.Table.from_arrays(columns, schema=SELECTION_SCHEMA), directory / SELECTION_FILE)
        manifest = seal(directory, kind=SELECTION_KIND, provenance=provenance, counts=counts)
    _report(manifest, cfg)
    return manifest


def frozen_taus(selection_dir: str | Path) -> dict[str, float]:
    """The taus of the first round's selection, for the rounds after it (METHOD section 3)."""
    return read_manifest(selection_dir, kind=SELECTION_KIND).counts["taus"]


def what_if(
    annotations_dir: str | Path, cfg: SelectConfig, taus: Sequence[float], *, prompts_dir: str | Path | None = None
) -> list[dict[str, Any]]:
    """What each of several taus would select; nothing is written.

    Args:
        annotations_dir: The store.
        cfg: Filter and lower bound; its tau is not looked at.
        taus: Upper bounds of all samples; none: the ``QUANTILES`` of the filter's measure.
        prompts_dir: As of ``select_round``.

    Returns:
        The counts of ``select_round``, for each tau, with the response ``tokens`` kept.
    """
    samples = _Samples.read(AnnotationStore(annotations_dir), prompts_dir, cfg)
    if not taus:
        taus = [samples.taus(replace(cfg, tau_quantile=quantile))[""] for quantile in QUANTILES]
    rows = []
    for tau in taus:
        zones_N, kept_N, reasons_N = samples.decide(cfg, {"": tau})
        counts = _counts(samples, cfg, {"": tau}, zones_N, kept_N, reasons_N)
        rows.append(counts | {"tokens": int(samples.store.response_lens[kept_N].sum())})
    return rows


def _domains(prompt_ids: pa.ChunkedArray, prompts_dir: str | Path | None, column: str) -> npt.NDArray[np.str_]:
    """Domain of each sample, from the columns that its prompt carries along."""
    if prompts_dir is None:
        raise UserError(f"prompts must be given with domain_column {column}, got none; name their sealed directory")
    read_manifest(prompts_dir, kind="prompts")
    prompts = pq.read_table(Path(prompts_dir) / PROMPTS_FILE, columns=["prompt_id", "extras"])
    extras = dict(zip(*(prompts[name].to_pylist() for name in ("prompt_id", "extras")), strict=True))
    domains = {}
    for prompt_id in prompt_ids.unique().to_pylist():
        domain = json.loads(extras.get(prompt_id, "{}")).get(column)
        if not isinstance(domain, str) or not domain:
            raise UserError(
                f"column {column} of prompt {prompt_id} in {prompts_dir} must be a text, got {domain!r}; name a column "
                "that every prompt has, or leave domain_column out"
            )
        domains[prompt_id] = domain
    return np.array([domains[prompt_id] for prompt_id in prompt_ids.to_pylist()])


def _counts(
    samples: _Samples,
    cfg: SelectConfig,
    taus: Taus,
    zones_N: Zones,
    kept_N: npt.NDArray[np.bool_],
    reasons_N: npt.NDArray[np.str_],
) -> dict[str, Any]:
    total = len(samples.store)
    reasons, numbers = np.unique(reasons_N[~kept_N].astype(str), return_counts=True)
    in_zone = {zone: int((zones_N == zone).sum()) for zone in ZONES}
    return {
        "in": total,
        "kept": int(kept_N.sum()),
        "quarantined": dict(zip(reasons.tolist(), numbers.tolist(), strict=True)),
        "pending": 0,
        "kept_share": float(kept_N.mean()),
        "cut": int(samples.cut_N.sum()),
        "measure": FILTERS[cfg.filter].measure,
        "tau": taus[""],
        "taus": dict(taus),
        "lower": cfg.lower,
        "zones": {zone: {"count": count, "share": count / total} for zone, count in in_zone.items()},
        "histogram": histogram(samples.measures[FILTERS[cfg.filter].measure], cfg.lower, taus[""]),
    }


def _nullable(values_N: Floats) -> pa.Array:
    return pa.array(values_N, mask=np.isnan(values_N))


def _report(manifest: Manifest, cfg: SelectConfig) -> None:
    counts = manifest.counts
    get_logger().info(
        "%d of %d samples kept (filter %s, %g <= %s <= %g%s)",
        counts["kept"],
        counts["in"],
        cfg.filter,
        cfg.lower,
        counts["measure"],
        counts["tau"],
        f", {counts['cut']} cut by length" if counts["cut"] else "",
    )
    if counts["kept_share"] < LEAST_KEPT_SHARE:
        dropped = ", ".join(f"{number} {reason}" for reason, number in counts["quarantined"].items())
        get_logger().warning(
            "only %.1f %% of the samples are kept (%s); the paper keeps about 96 %%. Where the teacher is near certain "
            "and the student right, Delta-IFD sits just under 0: consider a lower bound below 0 or filter none",
            100 * counts["kept_share"],
            dropped,
        )

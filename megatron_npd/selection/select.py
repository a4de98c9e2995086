"""The selection stage: which of a round's responses train, why the others do not, and how much each weighs.

Legend: N samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_npd.config.settings import SelectConfig
from megatron_npd.data.prompt_rows import PromptRows
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import MANIFEST, Manifest, file_sha256, read_manifest, seal, sealed_from, writing
from megatron_npd.records import SELECTION_FILE, SELECTION_SCHEMA
from megatron_npd.selection.metrics import FILTERS, ZONES, Floats, Zones, histogram, measures, sample_weights, zones
from megatron_npd.store.annotation_store import AnnotationStore

SELECTION_KIND = "selection"
LEAST_KEPT_SHARE = 0.9
CUT = "cut_by_length"
REASONS = ("", *filter(None, ZONES.values()), CUT)  # why a sample is dropped; "": it is not
QUANTILES = (0.9, 0.95, 0.98, 0.988, 0.995, 1.0)
LOSSES = ("teacher_loss", "teacher_loss_unconditional", "student_loss", "student_loss_unconditional")

Taus = Mapping[str, float]  # domain -> tau; "" is that of all samples, and of domains that have none


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """What a selection decides by, in the store's order: numbers alone, some 50 bytes per sample."""

    store: AnnotationStore
    losses: dict[str, Floats]
    measures: dict[str, Floats]
    cut_N: npt.NDArray[np.bool_]
    copies_N: npt.NDArray[np.int32]
    prompts_N: npt.NDArray[np.int32] | None  # number of each sample's prompt, where prompts matter
    domains_N: npt.NDArray[np.int32] | None  # place in ``domains``
    domains: list[str]

    @classmethod
    def read(cls, store: AnnotationStore, prompts_dir: str | Path | None, cfg: SelectConfig) -> _Samples:
        wanted = ("finish_reason", "copies", *LOSSES)
        parts = [_numbers(part) for part in store.parts(*wanted)]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        losses = {name: columns.get(name, np.zeros(0, np.float32)) for name in LOSSES}
        prompts_N = domains_N = None
        domains: list[str] = []
        if cfg.prompt_weights or cfg.domain_column:
            prompts_N, names = _prompts(store)
            if cfg.domain_column:
                domains, domains_of_prompts = _domains(names, prompts_dir, cfg.domain_column)
                domains_N = domains_of_prompts[prompts_N]
        return cls(
            store=store,
            losses=losses,
            measures=measures(losses),
            cut_N=columns.get("cut", np.zeros(0, bool)),
            copies_N=columns.get("copies", np.zeros(0, np.int32)),
            prompts_N=prompts_N,
            domains_N=domains_N,
            domains=domains,
        )

    def taus(self, cfg: SelectConfig) -> dict[str, float]:
        """tau as the configuration's quantile, of all samples and of each domain."""
        measure_N = self.measures[FILTERS[cfg.filter].measure].astype(np.float64)
        defined_N = ~np.isnan(measure_N)
        if not defined_N.any():
            if FILTERS[cfg.filter].undefined and len(self.store):
                return {"": math.inf}
            raise UserError(
                f"{self.store.path} must hold a sample with a defined IFD, got none of {len(self.store)}; annotate it "
                "with unconditional true, or take filter none"
            )
        taus = {"": float(np.quantile(measure_N[defined_N], cfg.tau_quantile))}
        for place, domain in enumerate(self.domains):
            if len(own := measure_N[defined_N & (self.domains_N == place)]):
                taus[domain] = float(np.quantile(own, cfg.tau_quantile))
        return taus

    def decide(self, cfg: SelectConfig, taus: Taus) -> tuple[Zones, npt.NDArray[np.bool_], npt.NDArray[np.int8]]:
        """Zone, whether it trains, and the place in ``REASONS`` of what is against it, of each sample."""
        chosen = FILTERS[cfg.filter]
        tau: float | npt.NDArray[np.float64] = taus[""]
        if self.domains_N is not None:
            tau = np.array([taus.get(name, taus[""]) for name in self.domains])[self.domains_N]
        zones_N = zones(self.measures[chosen.measure], cfg.lower, tau)
        kept_N = chosen.keeps(zones_N)
        of_zone = np.array([REASONS.index(reason) for reason in ZONES.values()], np.int8)
        reasons_N = np.where(kept_N, np.int8(0), of_zone[zones_N])
        if cfg.cut_by_length == "drop":
            reasons_N[kept_N & self.cut_N] = REASONS.index(CUT)
            kept_N &= ~self.cut_N
        return zones_N, kept_N, reasons_N

    def weights(self, cfg: SelectConfig, kept_N: npt.NDArray[np.bool_]) -> Floats:
        """Weight of each sample's loss."""
        factor_N = None
        if FILTERS[cfg.filter].by_perplexity:
            factor_N = np.exp(-self.losses["teacher_loss"].astype(np.float64))
        prompts_N = self.prompts_N if cfg.prompt_weights else None
        return sample_weights(
            kept_N, self.store.response_lens, copies_N=self.copies_N, prompts_N=prompts_N, factor_N=factor_N
        )


def _numbers(part: pa.Table) -> dict[str, np.ndarray]:
    """A shard's columns, as numbers."""
    numbers = {name: part[name].to_numpy() for name in ("copies", *LOSSES)}
    return numbers | {"cut": pc.call_function("equal", [part["finish_reason"], "length"]).to_numpy()}


def _prompts(store: AnnotationStore) -> tuple[npt.NDArray[np.int32], pa.LargeStringArray]:
    """The number of each sample's prompt, and the prompts' ids by number."""
    ids = [part["prompt_id"].cast(pa.large_string()) for part in store.parts("prompt_id")]
    encoded = pa.concat_tables([pa.table({"id": column}) for column in ids])["id"].combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary


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
        The manifest. Counts: the books (every dropped sample under its reason), ``tau`` and ``taus`` (null and empty
        where no sample has a defined measure and the filter asks for none), ``kept_share``, ``cut`` (responses cut by
        length, kept or not), ``zones`` (``{"count", "share"}`` each) and ``histogram``.

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
    quantiles = samples.taus(cfg)  # refuses a round without a defined measure, where the filter needs one
    taus = quantiles if given is None else given
    zones_N, kept_N, reasons_N = samples.decide(cfg, taus)
    weights_N = samples.weights(cfg, kept_N)
    counts = _counts(samples, cfg, taus, zones_N, kept_N, reasons_N)
    if not weights_N.any():  # a sealed selection of nothing could be neither packed nor made with other settings
        raise UserError(
            f"{store.path} must leave a sample that trains, got none of {len(store)} (filter {cfg.filter}; "
            f"{_found(counts)}): {_advice(counts)}; npd select --dry-run shows what several taus would keep"
        )
    with writing(out_dir) as directory:
        _write(directory / SELECTION_FILE, samples, zones_N, kept_N, reasons_N, weights_N)
        manifest = seal(directory, kind=SELECTION_KIND, provenance=provenance, counts=counts)
    _report(manifest, cfg)
    return manifest


def frozen_taus(selection_dir: str | Path) -> dict[str, float] | None:
    """The taus of the first round's selection, for the rounds after it (METHOD section 3); None where it has none."""
    return read_manifest(selection_dir, kind=SELECTION_KIND).counts["taus"] or None


def dry_run(
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


def check_domains(prompts_dir: str | Path, column: str) -> None:
    """Refuse a ``domain_column`` that a prompt does not have, before anything is generated.

    Raises:
        UserError: The column of a prompt holds no text.
    """
    ids = [batch.column("prompt_id").cast(pa.large_string()) for batch in PromptRows(prompts_dir).batches("prompt_id")]
    _domains(pa.concat_arrays(ids), prompts_dir, column)


def _domains(
    prompt_ids: pa.LargeStringArray, prompts_dir: str | Path | None, column: str
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The domains, and the place among them of each prompt's, from the columns that prompts carry along."""
    if prompts_dir is None:
        raise UserError(f"prompts must be given with domain_column {column}, got none; name their sealed directory")
    read_manifest(prompts_dir, kind="prompts")
    rows, domains = PromptRows(prompts_dir), dict[str, int]()
    ids, places = [], []
    for batch in rows.batches("prompt_id", "extras"):
        ids.append(batch.column("prompt_id").cast(pa.large_string()))
        values = [json.loads(extras).get(column) for extras in batch.column("extras").to_pylist()]
        texts = (value if isinstance(value, str) else "" for value in values)
        places.append([domains.setdefault(text, len(domains)) if text else -1 for text in texts])
    options = pc.SetLookupOptions(pa.concat_arrays(ids))
    found = pc.call_function("index_in", [prompt_ids], options).fill_null(-1).to_numpy()
    place_of_row = np.append(np.concatenate(places), -1).astype(np.int32)  # -1, of none, is the last
    places_of_prompts = place_of_row[found]
    for prompt in np.flatnonzero(places_of_prompts < 0).tolist():
        row = int(found[prompt])
        value = None if row < 0 else json.loads(rows.read(row, row + 1, "extras")["extras"][0].as_py()).get(column)
        raise UserError(
            f"column {column} of prompt {prompt_ids[prompt]} in {prompts_dir} must be a text, got {value!r}; name a "
            "column that every prompt has, or leave domain_column out"
        )
    return list(domains), places_of_prompts


def _counts(
    samples: _Samples,
    cfg: SelectConfig,
    taus: Taus,
    zones_N: Zones,
    kept_N: npt.NDArray[np.bool_],
    reasons_N: npt.NDArray[np.int8],
) -> dict[str, Any]:
    total = len(samples.store)
    reasons = dict(zip(REASONS, np.bincount(reasons_N, minlength=len(REASONS)).tolist(), strict=True))
    in_zone = dict(zip(ZONES, np.bincount(zones_N, minlength=len(ZONES)).tolist(), strict=True))
    return {
        "in": total,
        "kept": int(kept_N.sum()),
        "quarantined": {reason: number for reason, number in sorted(reasons.items()) if reason and number},
        "pending": 0,
        "kept_share": float(kept_N.mean()),
        "cut": int(samples.cut_N.sum()),
        "measure": FILTERS[cfg.filter].measure,
        "tau": None if math.isinf(taus[""]) else taus[""],
        "taus": {} if math.isinf(taus[""]) else dict(taus),
        "lower": cfg.lower,
        "zones": {zone: {"count": count, "share": count / total} for zone, count in in_zone.items()},
        "histogram": histogram(samples.measures[FILTERS[cfg.filter].measure], cfg.lower, taus[""]),
    }


def _write(
    file: Path,
    samples: _Samples,
    zones_N: Zones,
    kept_N: npt.NDArray[np.bool_],
    reasons_N: npt.NDArray[np.int8],
    weights_N: Floats,
) -> None:
    """The table of the selection, a row group for each shard of the store."""
    after = 0
    with pq.ParquetWriter(file, SELECTION_SCHEMA) as writer:
        for ids in samples.store.parts("sample_id", "source", "policy_version"):
            part = slice(after, after := after + len(ids))
            columns = [
                *ids.columns,
                *(_nullable(samples.measures[name][part]) for name in ("ifd_teacher", "ifd_student", "delta")),
                _words(zones_N[part], tuple(ZONES)),
                samples.cut_N[part],
                kept_N[part],
                _words(reasons_N[part], REASONS),
                weights_N[part],
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=SELECTION_SCHEMA))


def _nullable(values_N: Floats) -> pa.Array:
    return pa.array(values_N, mask=np.isnan(values_N))


def _words(places_N: npt.NDArray[np.int8], words: Sequence[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(places_N), pa.array(words)).cast(pa.string())


def _report(manifest: Manifest, cfg: SelectConfig) -> None:
    counts = manifest.counts
    get_logger().info(
        "%d of %d samples kept (filter %s, %s%s)",
        counts["kept"],
        counts["in"],
        cfg.filter,
        _bounds(counts),
        f", {counts['cut']} cut by length" if counts["cut"] else "",
    )
    if counts["kept_share"] < LEAST_KEPT_SHARE:
        get_logger().warning(
            "only %.1f %% of the samples are kept (%s); the paper keeps about 96 %%: %s",
            100 * counts["kept_share"],
            _found(counts),
            _advice(counts),
        )


def _found(counts: Mapping[str, Any]) -> str:
    """How many samples each zone holds, and the bounds."""
    found = ", ".join(f"{counts['zones'][zone]['count']} {zone}" for zone in ZONES)
    return f"{_bounds(counts)}: {found}; {counts['cut']} cut by length"


def _bounds(counts: Mapping[str, Any]) -> str:
    if counts["tau"] is None:
        return f"{counts['measure']} undefined"
    return f"{counts['lower']:g} <= {counts['measure']} <= {counts['tau']:g}"


def _advice(counts: Mapping[str, Any]) -> str:
    """What to change, by the reason that most samples are dropped for."""
    lower, tau, measure = f"{counts['lower']:g}", f"{counts['tau'] or 0:g}", counts["measure"]
    dropped = counts["quarantined"]
    return {
        "degenerate": f"most of the dropped are below the lower bound {lower}. Where the teacher is near certain and "
        f"the student right, {measure} sits just under 0: consider a lower bound below {lower}, or filter none",
        "cognitive_disconnect": f"most of the dropped are above tau {tau}: consider a larger tau or tau_quantile",
        "ifd_undefined": "most of the dropped have no defined IFD (the loss without the prompt is below 1e-6, or one "
        "is not finite): look at the losses of the annotations",
        CUT: "most of the dropped were cut by length: consider more max_tokens in the rollouts, or cut_by_length keep",
        "": "the weights of all samples are 0: consider another filter",
    }[max(dropped, key=dropped.__getitem__, default="")]

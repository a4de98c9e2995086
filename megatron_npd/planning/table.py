"""A plan as text, for a terminal, and as a dictionary, for tools."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from megatron_npd.config.settings import LayoutConfig
from megatron_npd.planning.layouts import Candidate, by_time, cut, is_own
from megatron_npd.planning.memory import RankMemory
from megatron_npd.planning.model import Layout, parameters
from megatron_npd.planning.plan import Plan, Split
from megatron_npd.platform.accelerators import GB, GIB, TERA

_SHOWN, _LARGE = 6, 2  # layouts of a table that fit, and that are too large
_HOURS = ["as: TP x PP x CP; rollout, annotate, train: of one round; select and pack take seconds per million samples"]
_COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_TIMES = ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
_WIDTH = 120  # of lines that are no rows of a table
# Parts of a rank's memory, with what heads their column.
_PARTS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "logits": "logits",
    "working": "work",
}


def as_text(plan: Plan) -> str:
    """All of a plan, in sections."""
    sections = [_head(plan), _training(plan), _annotation(plan), _servers(plan), _splits(plan), _storage(plan)]
    sections += [_settings(plan), _assumptions(plan)]
    return "\n\n".join("\n".join(map(_wrapped, section)) for section in sections if section)


def _wrapped(line: str) -> str:
    """A line of words, such as a reason or flags, at the width of a terminal; rows of tables are narrower."""
    parts = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    return line if len(line) <= _WIDTH else textwrap.fill(line, _WIDTH, **parts)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The same numbers, in bytes and seconds, for ``--json``."""
    work = asdict(plan.work) | {"passes": plan.work.passes}
    return {
        "device": plan.cfg.gpu,
        "nodes": plan.cfg.num_nodes,
        "devices_per_node": plan.machine.per_node,
        "student_parameters": parameters(plan.student),
        "teacher_parameters": parameters(plan.teacher) if plan.teacher is not None else None,
        "work": work,
        "training_layouts": [_candidate_dict(candidate) for candidate in plan.training],
        "annotation_layouts": [_candidate_dict(candidate) for candidate in plan.annotation],
        "servers": [asdict(server) | {"per_device": server.per_device} for server in plan.servers],
        "splits": [_split_dict(split) for split in plan.splits],
        "storage": plan.storage,
        "assumptions": asdict(plan.cfg.assume),
    }


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    memory = candidate.memory
    result = asdict(candidate)
    return result | {"memory": None if memory is None else asdict(memory) | {"total": memory.total}}


def _split_dict(split: Split) -> dict[str, Any]:
    layouts = {name: candidate and asdict(candidate.layout) for name, candidate in _layouts_of(split).items()}
    sizes = {name: getattr(split, name) for name in ("train_nodes", "server_nodes", "max_lead", "total")}
    return sizes | {"layouts": layouts, "round_seconds": asdict(split.seconds)}


def _layouts_of(split: Split) -> dict[str, Candidate | None]:
    return {"annotate": split.annotate, "train": split.train}


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns: the first to the left, numbers to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return [_line(row, widths) for row in table]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *others]).rstrip()


def _head(plan: Plan) -> list[str]:
    cfg, work, device = plan.cfg, plan.work, plan.machine.device
    flops = device.flops(cfg.train.bf16) / TERA
    lines = [
        f"{cfg.num_nodes} x {plan.machine.per_node} {cfg.gpu}: {device.memory / GIB:.1f} GiB, "
        f"{flops:.0f} TFLOP/s in {_kind(cfg.train.bf16)}, {device.bandwidth / GB:.0f} GB/s",
        f"student  {_size(parameters(plan.student))}  {cfg.student}",
    ]
    if plan.teacher is not None:
        lines.append(f"teacher  {_size(parameters(plan.teacher))}  {cfg.teacher}")
    size = f"{cfg.mean_prompt} + {cfg.mean_response} tokens"
    lines += [
        f"work     rounds {work.rounds}, samples per round {work.samples}, of {size}, {work.kept} kept; "
        f"{cfg.train.train_iters} steps, {work.passes:.2f} passes over them"
    ]
    return lines


def _kind(bf16: bool) -> str:
    return "bf16" if bf16 else "fp32"


def _size(count: float) -> str:
    unit, name = next(((unit, name) for unit, name in _COUNTS if count >= unit), _COUNTS[-1])
    return f"{count / unit:.2f}{name}"


def _bytes(count: float) -> str:
    unit, name = next(((unit, name) for unit, name in _BYTES if count >= unit), _BYTES[-1])
    return f"{count / unit:.1f} {name}" if count else "-"


def _gib(count: float) -> str:
    return f"{count / GIB:.{1 if count >= GIB else 2}f}" if count else "-"


def _duration(seconds: float) -> str:
    unit, name = next(((unit, name) for unit, name in _TIMES if seconds >= unit), _TIMES[-1])
    return f"{seconds / unit:.1f} {name}" if seconds else "-"


def _training(plan: Plan) -> list[str]:
    names = (f"training on {_nodes(plan)}: GiB", *_PARTS.values(), "total", "step", "computes", "waits")
    fitting, large, refused = _sorted(plan.training)
    rows = []
    for candidate in _shown(fitting, large, plan.cfg.train):
        assert candidate.memory is not None
        row = [_name(candidate, plan.cfg.train), *_memory(candidate.memory, _PARTS)]
        if (step := candidate.step) is None:
            rows.append([*row, "too large", "", ""])
            continue
        waits = step.total - step.compute - step.update
        shares = [f"{100 * part / step.total:.0f} %" for part in (step.compute, waits)]
        rows.append([*row, _duration(step.total), *shares])
    own = [one for one in large if _is_own(one, plan.cfg.train)]
    return [*_rows(names, rows), *_others(fitting, large), *_refused([*own, *refused])]


def _annotation(plan: Plan) -> list[str]:
    if not plan.annotation:
        return []
    parts = ("weights", "logits", "working")
    fitting, large, refused = _sorted(plan.annotation)
    rows = []
    for candidate in _shown(fitting, large, plan.cfg.annotate):
        assert candidate.memory is not None
        time = "too large" if candidate.seconds is None else _duration(candidate.seconds)
        rows.append([_name(candidate, plan.cfg.annotate), *_memory(candidate.memory, parts), time])
    header = (f"annotation on {_nodes(plan)}: GiB", *(_PARTS[name] for name in parts), "total", "round")
    return [*_rows(header, rows), *_others(fitting, large), *_refused(refused)]


def _nodes(plan: Plan) -> str:
    number = plan.splits[0].train_nodes if plan.splits else plan.cfg.num_nodes
    return f"{number} node{'s' if number > 1 else ''}"


def _shown(fitting: list[Candidate], large: list[Candidate], cfg: LayoutConfig) -> list[Candidate]:
    """The first of each, and before them the one that the settings ask for."""
    own = [one for one in [*fitting, *large] if _is_own(one, cfg)]
    return own + [one for one in [*fitting[:_SHOWN], *large[:_LARGE]] if not _is_own(one, cfg)]


def _is_own(candidate: Candidate, cfg: LayoutConfig) -> bool:
    return is_own(cfg, candidate.layout)


def _name(candidate: Candidate, cfg: LayoutConfig) -> str:
    return f"{candidate.layout}{' (as set)' if _is_own(candidate, cfg) else ''}"


def _memory(memory: RankMemory, parts: Iterable[str]) -> list[str]:
    return [_gib(getattr(memory, name)) for name in parts] + [_gib(memory.total)]


def _sorted(candidates: list[Candidate]) -> tuple[list[Candidate], list[Candidate], list[Candidate]]:
    """Those that fit, by time; those too large for a device, by size; and those that a check refuses."""
    fitting = sorted((one for one in candidates if one.seconds is not None), key=by_time)
    large = [one for one in candidates if one.seconds is None and one.memory is not None]
    large.sort(key=lambda one: one.memory.total if one.memory is not None else 0)
    return fitting, large, [one for one in candidates if one.memory is None]


def _others(fitting: list[Candidate], large: list[Candidate]) -> list[str]:
    """How many the table leaves out."""
    left = [(len(fitting) - _SHOWN, "that fit, slower"), (len(large) - _LARGE, "too large")]
    return [f"and {number} more {what}" for number, what in left if number > 0]


def _refused(candidates: list[Candidate]) -> list[str]:
    """Each reason once, with the layouts that it is true of."""
    layouts: dict[str, list[str]] = {}
    for candidate in candidates:
        layouts.setdefault(candidate.refused, []).append(candidate.layout.sizes)
    return [f"refused TP x PP = {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in layouts.items()]


def _servers(plan: Plan) -> list[str]:
    if plan.server is None:
        room = plan.machine.memory / GIB
        return [f"rollout: no server fits: weights leave no room for a cache in {room:.1f} GiB per device"]
    rows = []
    for server in sorted(plan.servers, key=lambda one: -one.per_device):
        how, memory = server.decoding, server.memory
        rows.append(
            [
                str(how.devices),
                _gib(memory.weights),
                str(memory.cache_tokens),
                str(how.batch),
                f"{1000 * how.step:.1f}",
                f"{server.per_device:.0f}",
            ]
        )
    header = ("rollout: devices per server", "weights GiB", "cache tokens", "batch", "ms per step")
    header += ("tokens/s per device",)
    return _rows(header, rows)


def _splits(plan: Plan) -> list[str]:
    by_nodes = sorted((sorted(nodes), reason) for reason, nodes in plan.refused.items())
    refused = [f"refused where {', '.join(map(str, nodes))} train: {reason}" for nodes, reason in by_nodes]
    if not plan.splits:
        return ["hours: no split of the nodes fits", *refused]
    rows = []
    for split in plan.splits[:_SHOWN]:
        name = "all in turns" if _in_turns(plan, split) else f"{split.server_nodes} serve, {split.train_nodes} train"
        seconds = [getattr(split.seconds, item.name) for item in fields(split.seconds)]
        cuts = [one.layout.sizes if one else "-" for one in (split.annotate, split.train)]
        cuts[1] += " recompute" * split.train.layout.recompute
        rows.append([name, str(split.max_lead), *cuts, *map(_duration, seconds), _duration(split.total)])
    header = ("hours", "max_lead", "annotate as", "train as", "rollout", "annotate", "train", "whole run")
    more = len(plan.splits) - _SHOWN
    return [*_rows(header, rows), *([f"and {more} more, slower"] if more > 0 else []), *_HOURS, *refused]


def _storage(plan: Plan) -> list[str]:
    rows = [[name, _bytes(size)] for name, size in plan.storage.items()]
    return _rows(("storage", "size"), [*rows, ["in all", _bytes(sum(plan.storage.values()))]])


def _settings(plan: Plan) -> list[str]:
    """The flags of the shortest split, and what a reader would else overlook."""
    lines = []
    if plan.splits:
        lines.append(f"shortest: {' '.join(_flags(plan, plan.splits[0]))}")
    if plan.cfg.annotate.backend == "vllm":
        lines.append(
            "note: annotate.backend is vllm: its hours are planned as those of megatron-core on the same ranks"
        )
    for name, computes in (("train", True), ("annotate", plan.cfg.annotate.backend != "none")):
        if computes and not getattr(plan.cfg, name).bf16:
            lines.append(f"note: {name}.bf16 is false, and float32 is planned; --{name}.bf16 computes in bfloat16")
    return lines


def _in_turns(plan: Plan, split: Split) -> bool:
    return split.train_nodes + split.server_nodes > plan.cfg.num_nodes


def _flags(plan: Plan, split: Split) -> list[str]:
    server = plan.server
    assert server is not None
    devices = server.decoding.devices
    found: dict[str, object] = {"nproc-per-node": plan.machine.per_node}
    if plan.cfg.take_turns or _in_turns(plan, split):
        found["take-turns"] = "true"
    if plan.cfg.num_nodes > 1:
        found |= {"nnodes": plan.cfg.num_nodes, "train-nodes": split.train_nodes, "max-lead": split.max_lead}
    found["rollout.num-servers"] = plan.machine.per_node // devices
    if devices > 1:
        found["rollout.server-args"] = f"[--tensor-parallel-size={devices}]"
    for name, candidate in (("annotate", split.annotate), ("train", split.train)):
        if candidate is not None:
            found |= {f"{name}.{field}": value for field, value in _chosen(plan, name, candidate.layout).items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in found.items()]


def _chosen(plan: Plan, name: str, layout: Layout) -> dict[str, object]:
    """A stage's settings of its layout: the main sizes, and what is not as the recipe has it."""
    given, settings = getattr(plan.asked, name), vars(cut(getattr(plan.cfg, name), layout))
    shown = ["tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"]
    shown += ["context_parallel_size"] * (layout.cp > 1)
    values = {field: value for field, value in settings.items() if field in shown or value != getattr(given, field)}
    return {field: str(value).lower() if isinstance(value, bool) else value for field, value in values.items()}


def _assumptions(plan: Plan) -> list[str]:
    given = asdict(plan.cfg.assume) | {"kept_share": plan.cfg.kept_share}
    return [
        f"device   {plan.machine.device.source}",
        "assumed  " + ", ".join(f"{name} {value}" for name, value in given.items()) + " (npd plan --help says what)",
    ]

"""What a resumed run may change: which results depend on which setting, and what a change makes anew.

A setting belongs to the first stage whose results depend on it; so do those of all later stages, and of all later
rounds. A change is taken over while there are no such results. Where there are, the run is refused with their names,
or, with ``--redo``, removes them and makes them anew.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_npd.config.run import NPDConfig
from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import MANIFEST, is_sealed, read_manifest
from megatron_npd.pipeline.stages import STAGES
from megatron_npd.run_dir import RunDir

# What results come from, in order; what is measured of policies is made anew without asking.
ORDER = [stage.name for stage in STAGES.values() if stage.kind and stage.per != "policy"]
# The first stage that depends on a setting: by its group, but for those named; on those without a group the prompts do.
_GROUPS = {stage.settings: stage.name for stage in reversed(STAGES.values()) if stage.settings} | {"eval": "evaluation"}
_NAMED = {
    "rollout.max_model_len": "prompts",  # longer ones are quarantined
    "special_tokens_in_text": "prompts",
    "updates": "train",
    "responses": "rollout",
    "max_lead": "rollout",  # it decides which policy generates a round
}
_OF_A_ROUND = [name for name in ORDER if name not in ("prompts", "train", "export")]
_PATHS = ("run_dir", "teacher", "student", "prompts", "eval.prompts")
# No result depends on these: where and how fast it is computed, what is shown of it, how long is waited, where a stage
# gives up.
_FREE = {
    "": "run_dir platform take_turns redo nnodes node_rank train_nodes nproc_per_node master_addr master_port "
    "server_host server_port attempt launcher exit_duration_in_mins",
    "rollout.": "urls token_file num_servers server_args concurrency request_timeout start_timeout server_patience "
    "max_quarantined",
    "annotate.": "urls token_file concurrency max_quarantined follow_seconds keep_loaded micro_batch_size "
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size expert_model_parallel_size "
    "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers",
    "eval.": "teacher",
    "train.": "save_interval save_interval_in_mins most_recent_k async_save change_global_batch_size max_skipped_steps "
    "log_interval log_entropy tensorboard_dir wandb_project wandb_exp_name platform micro_batch_size balance_attention "
    "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size decoder_first_pipeline_num_layers "
    "decoder_last_pipeline_num_layers virtual_pipeline_model_parallel_size "
    "num_layers_per_virtual_pipeline_stage sequence_parallel recompute_granularity "
    "recompute_modules recompute_method recompute_num_layers overlap_grad_reduce overlap_param_gather "
    "fused_linear_loss loss_impl deterministic_mode profile profile_step_start profile_step_end profile_ranks",
}
HARMLESS = frozenset(prefix + name for prefix, names in _FREE.items() for name in names.split())


def keep_config(run: RunDir, cfg: NPDConfig) -> None:
    """Write the run's configuration, where it differs from the one before: if no result of that one contradicts it.

    ``config.json`` holds the configuration of the newest call, ``config_changes.jsonl`` what was changed before, with
    the results that were there.

    Raises:
        UserError: Results depend on what was changed; the message names both. Or another release began the run.
    """
    path = run.config
    if is_sealed(run.prompts):
        read_manifest(run.prompts, verify=False)  # another release's run is refused as one, not by its settings
    now = recorded(cfg)
    then = recorded(NPDConfig()) | _read(path) if path.exists() else now  # a newer setting had its default
    changed = {name: stage_of(name, then, now) for name in now if then.get(name) != now[name]}
    changed = {name: stage for name, stage in changed.items() if stage}
    if changed:
        listed = ", ".join(f"{name}: {then.get(name)!r} -> {now[name]!r}" for name in changed)
        _make_room(run, listed, set(changed.values()), redo=cfg.redo)
        _note(run, {name: [then.get(name), now[name]] for name in changed})
        get_logger().info("%s goes on with %s", run.root, listed)
    write_atomic(path, json.dumps(_nested(now), indent=1, sort_keys=True) + "\n")


def recorded(cfg: NPDConfig) -> dict[str, Any]:
    """A configuration as ``config.json`` holds it, flat: ``train.lr``; paths are absolute."""
    flat = _flat(json.loads(json.dumps(dataclasses.asdict(cfg))))
    flat |= {name: str(Path(flat[name]).resolve()) for name in _PATHS if flat[name]}
    return flat | {"redo": False}


def stage_of(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first stage whose results depend on a setting; "evaluation": only what is measured; empty: none."""
    if name in HARMLESS:
        return ""
    if name in ("eval.prompts", "eval.held_out") and not (then.get("eval.prompts") and now["eval.prompts"]):
        return "prompts"  # without problems of their own, the prompts to measure on are taken out of those that train
    return _NAMED.get(name) or _GROUPS.get(name.partition(".")[0], "prompts")


def _make_room(run: RunDir, changed: str, stages: set[str], *, redo: bool) -> None:
    """Remove what depends on changed settings, the last first; results only where that was asked for."""
    order = [ORDER.index(stage) for stage in stages - {"evaluation"}]
    dependent = list(_directories(run, ORDER[min(order)])) if order else []
    results = [path for path in dependent if _holds_results(path)]
    # Prompts are the user's file in other words: made again in no time, and no result by themselves.
    if not redo and any(path.name != "prompts" for path in results):
        names = ", ".join(str(path.relative_to(run.root)) for path in results)
        raise UserError(
            f"{run.root} must keep the settings that its results were made with, got {changed}, on which these depend: "
            f"{names}; take the change back, give another --run-dir, or give --redo to remove these and make them anew"
        )
    if dependent or "evaluation" in stages:
        _forget_measures(run, keep_first="evaluation" not in stages and min(order) > ORDER.index("annotate"))
    if dependent:
        run.schedule.unlink(missing_ok=True)  # the trainer appends its lines again
    for path in reversed(dependent):
        _remove(path)
        get_logger().info("removed %s", path)


def _directories(run: RunDir, first: str) -> Iterator[Path]:
    """The directories of a run that depend on the first round's stage ``first``, in the order of their making."""
    later = ORDER[ORDER.index(first) :]
    if "prompts" in later:
        yield from filter(Path.is_dir, [run.prompts])
    for index in range(len(run.rounds())):
        outputs = (STAGES[name].output(run, index) for name in _OF_A_ROUND if name in later or index)
        yield from (output for output in outputs if output is not None and output.is_dir())
    for directory in (run.checkpoints, run.policies):
        yield from sorted(path for path in directory.glob("[ivd]*") if path.is_dir())


def _holds_results(path: Path) -> bool:
    """Whether a stage left something in a directory that cost more than its start: sealed, or on its way to it."""
    if is_sealed(path) or any(is_sealed(shard) for shard in path.glob("shard-*")):
        return True
    for journal in path.glob("*.journal"):
        with open(journal, "rb") as stream:
            if stream.readline() and stream.readline():  # the first line holds the settings
                return True
    return False


def _forget_measures(run: RunDir, *, keep_first: bool) -> None:
    """Drop what was measured of policies that are made anew, or with other settings; ``keep_first``: but v0000's."""
    if (accuracy := run.accuracy).exists():
        kept = ("start", "teacher") if keep_first else ()
        known = {name: value for name, value in json.loads(accuracy.read_text()).items() if name in kept}
        write_atomic(accuracy, json.dumps({"start": None, "rounds": []} | known, indent=1) + "\n")
    if keep_first:
        measured = run.held_out.rounds()[1:]
    else:
        measured = [run.held_out.root, run.eval_prompts, run.teacher_eval_prompts]
    for path in filter(Path.is_dir, measured):
        _remove(path)


def _remove(path: Path) -> None:
    for manifest in path.rglob(MANIFEST):
        manifest.unlink()  # first, so that a part is never taken for the whole
    shutil.rmtree(path)


def _note(run: RunDir, changes: Mapping[str, list[Any]]) -> None:
    """Append to the history of the configuration what is changed, and which results were made before."""
    path = run.config_changes
    kept = [str(item.relative_to(run.root)) for item in _directories(run, ORDER[0]) if _holds_results(item)]
    line = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "changed": changes, "results_before": kept}
    before = path.read_text() if path.exists() else ""
    write_atomic(path, before + json.dumps(line) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        then = json.loads(path.read_text())
        if not isinstance(then, dict):
            raise ValueError(f"{type(then).__name__} in place of an object")
    except ValueError as error:
        raise UserError(f"{path} must be the configuration that began the run, got {error}; restore it") from error
    flat = _flat(then)
    return flat | {name: str(Path(flat[name]).resolve()) for name in _PATHS if flat.get(name)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, last = name.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[last] = value
    return tree

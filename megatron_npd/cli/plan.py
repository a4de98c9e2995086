"""Plan a run before it runs: memory per rank, hours, storage and the split of nodes, from its recipe and config.json.

``npd plan --config recipe.yaml --teacher DIR --student DIR --nodes 8 --gpus-per-node 8 --gpu h100-80g``; the models'
weights need not be there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.plan import PlanConfig
from megatron_npd.paths import check_model_dir
from megatron_npd.platform import get_platform


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan, as tables or as JSON."""
    cfg = parse_config(PlanConfig, argv)
    for name in ("teacher", "student"):
        check_model_dir(f"--{name}", getattr(cfg, name))
    get_platform("cpu")  # whatever device is planned for
    from megatron_npd.planning.plan import make_plan
    from megatron_npd.planning.table import as_dict, as_text

    plan = make_plan(cfg)
    print(json.dumps(as_dict(plan), indent=1) if cfg.json else as_text(plan))

"""Choose which of a round's annotated answers train, by Delta-IFD, and print a table of the zones."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys

if __name__ == "select":
    # Python puts the directory of a script first on its path, so the standard library's module of this name is looked
    # for here by every script beside this one (subprocess imports it): hand out the real one.
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec(__name__, elsewhere)
    assert spec is not None and spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
else:
    from collections.abc import Sequence
    from dataclasses import dataclass

    from megatron_npd.config import PlatformName, SelectConfig, parse_config
    from megatron_npd.log import run_main
    from megatron_npd.manifest import read_manifest
    from megatron_npd.platform import get_platform

    @dataclass(frozen=True, kw_only=True)
    class SelectToolConfig(SelectConfig):
        """Choose which of a round's annotated answers train, by Delta-IFD, and print a table of the zones."""

        annotations: str
        """Sealed annotations directory."""
        out: str
        """Directory to seal."""
        tau_of: str = ""
        """Selection of the first round, whose tau stays frozen; empty: tau or tau_quantile decide."""
        platform: PlatformName = "auto"
        """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def main(argv: Sequence[str] | None = None) -> None:
        config = parse_config(SelectToolConfig, argv, description=__doc__ or "")
        get_platform(config.platform)
        from megatron_npd.selection.select import select_round

        tau = read_manifest(config.tau_of, kind="selection").counts["tau"] if config.tau_of else None
        counts = select_round(config.annotations, config.out, config, tau).counts
        print(f"{'zone':<12} {'samples':>9} {'share':>8}")
        for zone, row in counts["zones"].items():
            print(f"{zone:<12} {row['count']:>9} {100 * row['share']:>6.2f} %")
        print(f"{'kept':<12} {counts['kept']:>9} {100 * counts['kept_share']:>6.2f} %")
        for reason, number in counts["quarantined"].items():
            print(f"dropped as {reason}: {number}")
        print(f"lower {counts['lower']:g}, tau {counts['tau']:.9g} (later rounds take it with --tau-of {config.out})")

    if __name__ == "__main__":
        run_main(main)

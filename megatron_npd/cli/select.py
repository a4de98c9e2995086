"""Choose which of a round's annotated responses train, by Delta-IFD, and print a table of the zones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npd.choices import PlatformName
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import SelectConfig
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class SelectCommand(SelectConfig):
    """Choose which of a round's annotated responses train, by Delta-IFD, and print a table of the zones."""

    annotations: str
    """Sealed annotations directory."""
    out: str = ""
    """Directory to seal; needed but with dry_run."""
    prompts: str = ""
    """Sealed prompts directory; needed with domain_column."""
    tau_of: str = ""
    """Selection of the first round, whose taus stay frozen; empty: tau or tau_quantile decide."""
    dry_run: bool = False
    """Write nothing; print what several taus would select."""
    taus: tuple[float, ...] = ()
    """The taus of the dry run; empty: some quantiles of this round."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out and not self.dry_run:
            raise UserError("out must be a directory to seal, got none; give it, or dry_run")


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(SelectCommand, argv)
    get_platform(config.platform)
    from megatron_npd.selection.select import dry_run, frozen_taus, select_round

    prompts = config.prompts or None
    if config.dry_run:
        rows = dry_run(config.annotations, config, config.taus, prompts_dir=prompts)
        print(f"{'tau':>10} {'below lower':>12} {'inside':>9} {'above tau':>10} {'undefined':>10} {'kept':>9}", end="")
        print(f" {'share':>9} {'tokens':>12}")
        for row in rows:
            counts = "{degenerate:>12} {proximal:>9} {disconnect:>10} {undefined:>10}".format(
                **{zone: entry["count"] for zone, entry in row["zones"].items()}
            )
            print(
                f"{_number(row['tau'], '.4g'):>10} {counts} {row['kept']:>9} {100 * row['kept_share']:>7.2f} %", end=""
            )
            print(f" {row['tokens']:>12}")
        return
    taus = frozen_taus(config.tau_of) if config.tau_of else None
    counts = select_round(config.annotations, config.out, config, taus, prompts_dir=prompts).counts
    print(f"{'zone':<12} {'samples':>9} {'share':>8}")
    for zone, row in counts["zones"].items():
        print(f"{zone:<12} {row['count']:>9} {100 * row['share']:>6.2f} %")
    print(f"{'kept':<12} {counts['kept']:>9} {100 * counts['kept_share']:>6.2f} %")
    for reason, number in counts["quarantined"].items():
        print(f"dropped as {reason}: {number}")
    print(f"cut by length: {counts['cut']}")
    print(f"measure {counts['measure']}, lower {counts['lower']:g}, tau {_number(counts['tau'], '.9g')}", end="")
    print(f" (later rounds take it with --tau-of {config.out})")
    for domain, tau in counts["taus"].items():
        if domain:
            print(f"tau of {domain}: {tau:.9g}")
    wrote(config.out, f"npd pack --annotations {config.annotations} --selection {config.out} --out PACKS")


def _number(tau: float | None, form: str) -> str:
    return "-" if tau is None else format(tau, form)

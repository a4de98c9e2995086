"""Put new weights into running vLLM servers.

``npd refresh --urls http://127.0.0.1:8100 --policy DIR --version v0001``
``npd refresh --urls ... --policy DIR --version v0001 --checkpoint DIR --hf-model DIR`` (exports it first)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.log import wrote
from megatron_npd.manifest import is_sealed


@dataclass(frozen=True, kw_only=True)
class RefreshCommand:
    """Put new weights into running vLLM servers."""

    urls: tuple[str, ...]
    """Base URLs of the servers."""
    policy: str
    """Hugging Face directory of the new policy, on a path that the servers see too."""
    version: str
    """Version that responses carry from now on, like v0001."""
    checkpoint: str = ""
    """Megatron checkpoint to export into the policy directory first, unless that is sealed already."""
    hf_model: str = ""
    """With checkpoint: Hugging Face directory that the model started from: configuration, tokenizer, tensor types."""
    token_file: str = ""
    """File with the servers' token, as npd serve keeps it."""
    request_timeout: float = 600.0
    """Time that a server may take to finish running requests, and to load, in seconds."""

    def __post_init__(self) -> None:
        if bool(self.checkpoint) != bool(self.hf_model):
            raise UserError("--checkpoint and --hf-model must come together, got one of them; give both or neither")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the configuration, export where asked, and refresh."""
    command = parse_config(RefreshCommand, argv)
    from megatron_npd.serving.pool import ServerPool
    from megatron_npd.serving.refresh import refresh

    if command.checkpoint and not is_sealed(command.policy):
        from megatron_npd.platform import get_platform

        get_platform("cpu")  # host memory is what a conversion needs
        from megatron_npd.models.convert import megatron_to_hf

        megatron_to_hf(command.checkpoint, command.hf_model, command.policy)
    cfg = RolloutConfig(token_file=command.token_file, request_timeout=command.request_timeout)
    pool = ServerPool(command.urls, cfg)
    refresh(pool, command.policy, command.version)
    if pool.lost:
        why = "; ".join(map(str, pool.lost.values()))
        raise UserError(f"all servers must take {command.policy}, got {len(pool.urls)} of {len(command.urls)}; {why}")
    urls = ",".join(command.urls)
    door = f" --token-file {command.token_file}" if command.token_file else ""
    wrote(
        f"{command.policy} into {len(command.urls)} servers as {command.version}",
        f"npd rollout --urls {urls}{door} --policy-version {command.version} --prompts PROMPTS --out ROLLOUTS",
    )

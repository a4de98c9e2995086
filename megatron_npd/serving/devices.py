"""The devices that a vLLM server computes on: how many, and which of them where several servers share a machine."""

from __future__ import annotations

import os

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError


def devices_of(cfg: RolloutConfig) -> int:
    """Devices of one server: its tensor-parallel ranks."""
    arguments = [part for argument in cfg.server_args for part in argument.split("=", 1)]
    sizes = [arguments[i + 1] for i, part in enumerate(arguments[:-1]) if part in ("--tensor-parallel-size", "-tp")]
    return int(sizes[-1]) if sizes else 1


def device_environment(cfg: RolloutConfig, index: int) -> dict[str, str]:
    """The environment that shows the ``index``-th of several servers its devices: consecutive ones.

    Raises:
        UserError: There are not that many.
    """
    from megatron_npd.platform import get_platform

    name, size = get_platform().visible_devices_env, devices_of(cfg)
    visible = os.environ.get(name, "")
    devices = visible.split(",") if visible else [str(i) for i in range((index + 1) * size)]
    if len(devices) < (index + 1) * size:
        raise UserError(
            f"{name} must list {size} devices for each of {cfg.num_servers} servers, got {visible}; lower num_servers"
        )
    return {name: ",".join(devices[index * size : (index + 1) * size])}

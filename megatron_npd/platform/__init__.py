"""The device platforms: ``get_platform`` picks one and prepares it before ``megatron.core`` is imported.

A new platform is one file beside ``cpu.py`` and one line in ``PLATFORMS``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from megatron_npd.errors import UserError
from megatron_npd.log import get_logger

if TYPE_CHECKING:  # torch is imported with the platform, after a command has checked its flags
    from megatron_npd.platform.base import Platform

__all__ = ["PLATFORMS", "get_platform"]

# Name -> module with a class ``Device``; "auto" takes the first that is there.
PLATFORMS = {
    "cuda": "megatron_npd.platform.cuda",
    "npu": "megatron_npd.platform.npu",
    "cpu": "megatron_npd.platform.cpu",
}

_prepared: Platform | None = None


def get_platform(name: str | None = None) -> Platform:
    """The process's platform, chosen and prepared on the first call.

    Args:
        name: ``cuda``, ``npu``, ``cpu``, or ``auto``; None: the one chosen before, else ``auto``.

    Raises:
        UserError: The named platform is unknown or cannot be had, or the process runs on another one already.
    """
    from megatron_npd.platform.base import PlatformUnavailable, without_wandb

    global _prepared
    if _prepared is not None:
        if name not in (None, "auto", _prepared.name):
            raise UserError(
                f"platform must be the one that this process runs on ({_prepared.name}), got {name}; "
                "start another process for it"
            )
        return _prepared
    if name in (None, "auto"):
        platform = _first_available()
        get_logger().info("platform %s (chosen automatically)", platform.name)
    elif name in PLATFORMS:
        try:
            platform = _load(name)
        except PlatformUnavailable as error:
            raise UserError(
                f"platform {name} must be usable here, got: {error}; use another platform or auto"
            ) from error
    else:
        raise UserError(f"platform must be one of {', '.join(PLATFORMS)} or auto, got {name}; correct it")
    with without_wandb():
        platform.prepare()
    _prepared = platform
    return platform


def _load(name: str) -> Platform:
    platform: Platform = importlib.import_module(PLATFORMS[name]).Device()
    platform.check_available()
    return platform


def _first_available() -> Platform:
    from megatron_npd.platform.base import PlatformUnavailable

    for name in PLATFORMS:
        try:
            return _load(name)
        except PlatformUnavailable as error:
            get_logger().debug("platform %s is not available: %s", name, error)
    raise AssertionError("the cpu platform is always available")

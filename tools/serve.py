"""Run rollout servers on this node until it is stopped, for stages that other commands or nodes start."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_npd.command import parse_config
from megatron_npd.config import PlatformName, RolloutConfig
from megatron_npd.log import UserError, run_main
from megatron_npd.manifest import write_atomic
from megatron_npd.platform import get_platform
from megatron_npd.rollout.server import VLLMServer


@dataclass(frozen=True, kw_only=True)
class ServeToolConfig(RolloutConfig):
    """Run rollout servers on this node until it is stopped, for stages that other commands or nodes start."""

    model: str
    """Hugging Face directory to serve."""
    policy_version: str = "v0000"
    """Version that the servers tag their answers with."""
    host: str = "127.0.0.1"
    """Name or address under which other nodes reach this one; anything but 127.0.0.1 opens the servers, and their
    control endpoints, which ask for no password, to the network."""
    port: int = 8100
    """Port of the first server; the others follow."""
    urls_file: str = ""
    """File to write the base URLs to, comma-separated, once all servers answer."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.urls:
            raise UserError(f"--urls must be empty, got {','.join(self.urls)}; this command starts servers itself")


def main() -> None:
    """Start the servers, announce them, and stay until a signal or the first server's end."""
    cfg = parse_config(ServeToolConfig, description=__doc__ or "")
    get_platform(cfg.platform)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # runs the exit stack: no server outlives this command
    if cfg.host != "127.0.0.1":
        cfg = dataclasses.replace(cfg, server_args=("--host", "0.0.0.0", *cfg.server_args))
    with ExitStack() as stack:
        servers = [VLLMServer(cfg.model, cfg, port=cfg.port + index, index=index) for index in range(cfg.num_servers)]
        for server in servers:
            stack.callback(server.stop)
            server.start()
        for server in servers:
            server.wait_ready(version=cfg.policy_version)
        urls = ",".join(f"http://{cfg.host}:{server.port}" for server in servers)
        if cfg.urls_file:
            write_atomic(cfg.urls_file, urls + "\n")
        print(urls, flush=True)
        while True:
            for server in servers:
                server.check_alive()
            time.sleep(1.0)


if __name__ == "__main__":
    run_main(main)

"""Run rollout servers on this node until it is stopped, for stages that other commands or nodes start."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_npd.choices import PlatformName
from megatron_npd.config.command_line import parse_config
from megatron_npd.config.settings import RolloutConfig
from megatron_npd.durable import write_atomic
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.platform import get_platform


@dataclass(frozen=True, kw_only=True)
class ServeCommand(RolloutConfig):
    """Run rollout servers on this node until it is stopped, for stages that other commands or nodes start."""

    model: str
    """Hugging Face directory to serve."""
    policy_version: str = "v0000"
    """Version that the servers tag their responses with."""
    host: str = "127.0.0.1"
    """Name or address of the interface to listen on, under which clients reach it; 127.0.0.1: this machine alone."""
    port: int = 8100
    """Port of the first server; the others follow."""
    restarts: int = 0
    """Times that each server that died is started again, with the model as given; 0: this command ends with it."""
    urls_file: str = ""
    """File to write the base URLs to, comma-separated, once all servers answer."""
    token_file: str = "servers.token"
    """File with the token that every request must carry (clients: --token-file); made, for its owner alone, if there is
    none. Several nodes may share one."""
    log_dir: str = ""
    """Directory of the servers' logs; empty: logs/ beside the token file."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.urls:
            raise UserError(f"--urls must be empty, got {','.join(self.urls)}; this command starts servers itself")


def main(argv: Sequence[str] | None = None) -> None:
    """Start the servers, announce them, and stay until a signal, or the end of a server that is not started again."""
    cfg = parse_config(ServeCommand, argv)
    from megatron_npd.pipeline.servers import watch_servers
    from megatron_npd.serving.access import keep_token
    from megatron_npd.serving.server import VLLMServer, start_servers

    get_platform(cfg.platform)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # runs the exit stack: no server outlives this command
    token = keep_token(cfg.token_file)
    log_dir = cfg.log_dir or Path(cfg.token_file).parent / "logs"
    servers = [
        VLLMServer(cfg.model, cfg, host=cfg.host, port=cfg.port + index, log_dir=log_dir, index=index, token=token)
        for index in range(cfg.num_servers)
    ]
    with ExitStack() as stack:
        start_servers(servers, version=cfg.policy_version)
        for server in servers:
            stack.callback(server.stop)
        urls = ",".join(server.url for server in servers)
        if cfg.urls_file:
            write_atomic(cfg.urls_file, urls + "\n")
        print(urls, flush=True)
        get_logger().info("clients give --urls %s --token-file %s", urls, Path(cfg.token_file).resolve())
        watch_servers(servers, lambda: False, cfg.restarts)

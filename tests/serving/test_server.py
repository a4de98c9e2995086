"""Starting and ending vLLM servers: what is refused before a start, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.serving.interface import reach
from megatron_npd.serving.server import VLLMServer, _attention, _checkpoint_dtype, start_servers
from megatron_npd.weights import SINGLE_FILE
from tests.helpers import make_tiny_model
from tests.serving.fake import FakeServer


def launch(model_dir: Path, cfg: RolloutConfig = RolloutConfig(), **arguments: Any) -> None:  # noqa: B008
    start_servers([VLLMServer(model_dir, cfg, **arguments)], version="v0000")


def group_exists(group: int) -> bool:
    """Whether a process of the group is left that is not a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def wait_for(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_head_size_that_dies_in_use_is_refused_before_the_start(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2)  # heads of 16
    with pytest.raises(UserError, match=r"head size of .* must be one of 32, 64, .* on a CPU, got 16"):
        launch(model)


SIZES = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SIZES, (28, 4, 128)),
        ({"text_config": SIZES, "vision_config": {"hidden_size": 1280}}, (28, 4, 128)),  # as Qwen2.5-VL's has it now
        (SIZES | {"head_dim": None, "num_key_value_heads": None}, (28, 28, 128)),
        (SIZES | {"head_dim": 256}, (28, 4, 256)),  # as Qwen3's and Gemma's
        ({"n_layer": 12, "n_head": 12, "n_embd": 768}, "num_attention_heads in .*config.json must be .*, got None"),
        ({"text_config": {"model_type": "llama"}}, "num_attention_heads in .*, got None; this model cannot be served"),
        (SIZES | {"num_attention_heads": 0}, "num_attention_heads in .*, got 0"),
        (SIZES | {"hidden_size": "wide"}, "hidden_size in .*, got 'wide'"),
        (SIZES | {"num_key_value_heads": [4, 8]}, r"num_key_value_heads in .*, got \[4, 8\]"),
        (SIZES | {"num_hidden_layers": None}, "num_hidden_layers in .*, got None"),
    ],
)
def test_sizes_of_every_family_are_read_or_refused(config: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            _attention(tmp_path, config)
    else:
        assert _attention(tmp_path, config) == expected


def test_the_type_of_the_language_model_is_the_servers() -> None:
    assert _checkpoint_dtype({"text_config": {"torch_dtype": "bfloat16"}}) == "bfloat16"
    assert _checkpoint_dtype({"dtype": "torch.float16"}) == "float16" and _checkpoint_dtype({}) == "float32"


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be a Hugging Face model directory, got no config\.json"):
        launch(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="must be JSON"):
        launch(tmp_path)


def test_a_port_on_which_another_server_answers_is_refused_at_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    with FakeServer() as other:
        port = other.server_address[1]
        with pytest.raises(UserError, match=rf"port {port} of 127\.0\.0\.1 must be a free one .*in use"):
            VLLMServer(tiny_model_dir, RolloutConfig(), port=port)
        server = VLLMServer(tiny_model_dir, RolloutConfig(), log_dir=tmp_path)
        server.url = other.url  # as if it had come between the look and the start
        with pytest.raises(UserError, match="must be the process that was started, got an answer from another one"):
            server.wait_ready(version="v0000", weights="")
        assert not other.called
    with pytest.raises(UserError, match=r"of 192\.0\.2\.1 must be a free one of this machine"):
        VLLMServer(tiny_model_dir, RolloutConfig(), host="192.0.2.1")


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "0"])
def test_a_host_that_names_no_interface_is_refused(tiny_model_dir: Path, host: str) -> None:
    """The token would be sent to whatever sits on that port of the client's own machine."""
    with pytest.raises(UserError, match=r"host must be the name or address of one interface, .* got '.*'; give 127"):
        VLLMServer(tiny_model_dir, RolloutConfig(), host=host)


def test_who_can_reach_a_server_is_said_in_words(tiny_model_dir: Path, tmp_path: Path) -> None:
    for host, where in (("127.0.0.1", r"127\.0\.0\.1"), ("localhost", r"localhost \(127\.0\.0\.1\)")):
        server = VLLMServer(tiny_model_dir, RolloutConfig(), host=host, log_dir=tmp_path)
        said = reach(host, server.address)
        assert re.fullmatch(f"servers on {where} are in reach of every user of this machine, not of others; .*", said)
    said = reach("node1", "10.0.0.5")
    assert said == "servers on node1 (10.0.0.5) are in reach of the network, unencrypted; the token guards them"
    with pytest.raises(UserError, match="must be a free one of this machine"):
        VLLMServer(tiny_model_dir, RolloutConfig(), host="." * 70)


def test_logs_of_no_directory_lie_in_a_private_one(tiny_model_dir: Path) -> None:
    servers = [VLLMServer(tiny_model_dir, RolloutConfig()) for _ in range(2)]
    first, second = (server.log_path for server in servers)
    assert first.parent.stat().st_mode & 0o777 == 0o700 and first.stat().st_mode & 0o777 == 0o600
    assert first.parent != second.parent
    for server in servers:
        server.stop()  # it has nothing to tell
        assert not server.log_path.parent.exists()


def test_the_log_that_an_error_names_stays(tiny_model_dir: Path) -> None:
    """Of a server that hangs, too, which is alive when it is stopped."""
    server = VLLMServer(tiny_model_dir, RolloutConfig())
    server.process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    server._started, server._ready = time.monotonic(), True
    try:
        said = str(server.failure("must generate"))
    finally:
        server.stop()
    assert server.log_path.exists() and str(server.log_path) in said
    shutil.rmtree(server.log_path.parent)


def test_undefined_weights_are_refused_at_the_start(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    tensors = load_file(model / SINGLE_FILE)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / SINGLE_FILE)
    server = VLLMServer(model, RolloutConfig(), log_dir=tmp_path)
    with pytest.raises(UserError, match=r"model\.norm\.weight in .* must hold finite numbers, got NaN or infinity"):
        start_servers([server], version="v0000")
    assert server.process is None


def test_a_server_that_dies_at_the_start_shows_its_log(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(get_logger(), "info", lambda message, *arguments: said.append(message % arguments))
    cfg = RolloutConfig(server_args=("--no-such-argument",))
    with pytest.raises(
        UserError, match=r"(?s)got an end with exit code 2; its log .*unrecognized arguments: --no-such-"
    ):
        launch(tiny_model_dir, cfg, log_dir=tmp_path)
    assert reach("127.0.0.1", "127.0.0.1") in said


def test_a_server_that_is_late_is_stopped(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    server = VLLMServer(tiny_model_dir, RolloutConfig(start_timeout=0.5), log_dir=tmp_path)
    server.start()
    assert server.process is not None
    group = server.process.pid
    with pytest.raises(UserError, match=r"must answer within start_timeout \(0 s\)"):
        server.wait_ready(version="v0000", weights="")
    assert not group_exists(group)
    assert not list((tmp_path / "tmp").iterdir())
    server.stop()  # once more is harmless


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_ends_with_its_parent(tiny_model_dir: Path, tmp_path: Path, number: int) -> None:
    program = (
        "import sys, time; from megatron_npd.config.settings import RolloutConfig\n"
        "from megatron_npd.serving.server import VLLMServer\n"
        "server = VLLMServer(sys.argv[1], RolloutConfig(), log_dir=sys.argv[2]); server.start()\n"
        "print(server.process.pid, flush=True); time.sleep(600)"
    )
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-c", program, str(tiny_model_dir), str(tmp_path)]
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    try:
        assert group_exists(group)
        os.kill(parent.pid, number)
        parent.wait()
        assert wait_for(lambda: not group_exists(group))
        assert wait_for(lambda: not list((tmp_path / "tmp").iterdir()))
    finally:
        parent.stdout.close()
        if group_exists(group):
            os.killpg(group, signal.SIGKILL)


def test_the_logs_tail_tells_the_cause_among_traces(tiny_model_dir: Path, tmp_path: Path) -> None:
    server = VLLMServer(tiny_model_dir, RolloutConfig(), log_dir=tmp_path)
    prefix = "(APIServer pid=20005) {} 11-22 13:04:31 [async_llm.py:906] "
    lines = [prefix.format("INFO") + "ready", prefix.format("ERROR") + "the cause", "Process EngineCore:"]
    for request in range(1000):
        lines += [prefix.format("ERROR") + f"Engine Exception caught. Request id: generate-tokens-{request:016x}"]
        lines += [prefix.format("ERROR") + '  File "x.py", line 1', prefix.format("ERROR") + "    return await func()"]
    server.log_path.write_text("\n".join(lines))
    tail = server.log_tail().splitlines()
    assert len(tail) == 3
    assert tail[0].endswith("the cause") and "EngineCore" in tail[1] and "caught" in tail[2]

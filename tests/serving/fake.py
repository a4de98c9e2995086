"""A stand-in for a vLLM server: the endpoints that the pool uses, answers as a function of the request, and troubles.

The real server is used in ``test_real_server.py``; this one is for deaths, hangs and counts in fractions of a second.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_npd.config.settings import RolloutConfig
from megatron_npd.manifest import seal, writing
from megatron_npd.records import PROMPT_SCHEMA, PROMPTS_FILE
from megatron_npd.serving.server import ServerLost, VLLMServer, tag
from megatron_npd.weights import read_weights

EOS = 2
# Of a small round: with 12 prompts 36 samples, in shards of 15, 15 and 6.
ROUND = RolloutConfig(
    max_model_len=64, max_tokens=20, shard_size=16, concurrency=4, sampled_paths=2, server_patience=0.0
)
CONTENT = "0123456789abcdef"  # hash of the weights that a new server holds
VOCAB_SIZE = 304
Trouble = Callable[[dict[str, Any]], Any]


def fake_answer(body: dict[str, Any], version: str) -> dict[str, Any]:
    """A choice that depends on prompt and sampling alone; about every second one ends with a stop token."""
    sampling = body["sampling_params"]
    rng = np.random.default_rng([sum(body["token_ids"]), sampling.get("seed") or 0, int(sampling["temperature"] * 10)])
    length = int(rng.integers(2, 30))
    ids = rng.integers(3, 300, min(length, sampling["max_tokens"])).tolist()
    stopped = length <= sampling["max_tokens"]
    if stopped:
        ids[-1] = EOS
    content = [
        {"token_id": i, "logprob": float(np.float32(x))} for i, x in zip(ids, -rng.random(len(ids)), strict=True)
    ]
    return {
        "finish_reason": "stop" if stopped else "length",
        "token_ids": ids,
        "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
        "logprobs": {"content": content} if "logprobs" in sampling else None,
    }


def fake_prompt_logprobs(body: dict[str, Any]) -> list[dict[str, Any] | None] | None:
    """At each token but the first: token ids 3, 4, ... with falling shares, and the token itself, most likely."""
    if (k := body["sampling_params"].get("prompt_logprobs")) is None:
        return None
    positions: list[dict[str, Any] | None] = [None]
    for token in body["token_ids"][1:]:
        ids = list(dict.fromkeys([token, *range(3, 3 + k)]))[: max(k, 1)]
        positions.append({str(i): {"logprob": -0.7 - n, "rank": n + 1} for n, i in enumerate(ids)})
    return positions


class FakeServer(ThreadingHTTPServer):
    """Starts on construction; a context manager.

    Attributes:
        version: What it marks its answers with: a version and the hash of its weights.
        asked: Bodies of the generate requests with more than one token to generate.
        answered: How many of them got an answer.
        called: Paths of all other POST requests.
        trouble: Called with each generate body; an int is a status to answer with (a pair: with headers), bytes are
            the whole body of an answer 200, a dict replaces fields of the choice, None is no trouble. It may sleep.
        headers_of: Answers ``npd_describe``, beside the size of the vocabulary.
        staged: Answers ``npd_staged``.
        loads: Answers ``npd_load``.
        refuses: A method of the workers that it does not know.
        load_status: Status that ``npd_load`` answers with.
        metrics: What ``/metrics`` says.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, version: str = "v0000") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.version = f"{version}-{CONTENT}"
        self.asked: list[dict[str, Any]] = []
        self.answered = 0
        self.called: list[str] = []
        self.trouble: Trouble = lambda body: None
        self.headers_of: Callable[[str], dict[str, Any]] = lambda directory: {}
        self.staged: Callable[[], dict[str, Any]] = lambda: {"ready": True}
        self.loads: Callable[[str], dict[str, Any]] = lambda directory: {"weights": CONTENT}
        self.load_status, self.refuses = 200, ""
        self.metrics: Callable[[], str] = lambda: ""
        self.max_model_len = 64
        self.dead = False
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __exit__(self, *args: Any) -> None:
        self.dead = True
        self.shutdown()
        super().__exit__(*args)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken pipes are part of the tests."""


class Launched(VLLMServer):
    """A stand-in that counts as launched by this process.

    Attributes:
        starts: How often it was started again, which takes ``seconds`` unless it is stopped meanwhile.
    """

    def __init__(self, fake: FakeServer, seconds: float = 0.0) -> None:
        self.fake, self.url, self.seconds, self.starts = fake, fake.url, seconds, 0
        self.stopped = threading.Event()

    def failure(self, what: str) -> ServerLost:
        return ServerLost(f"the stand-in {self.url} {what}")

    def restart(self) -> None:
        self.starts += 1
        if self.stopped.wait(self.seconds):
            raise self.failure("must start, got a stop")
        self.fake.dead, self.fake.version = False, tag(self.version, read_weights(self.model_dir).content_hash())

    def stop(self) -> None:
        self.stopped.set()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> FakeServer:
        assert isinstance(self.server, FakeServer)
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._answer(200, {"data": [{"max_model_len": self.fake.max_model_len}]})
        elif self.path == "/metrics":
            self._answer(200, self.fake.metrics().encode())
        else:
            self._answer(200, {"weight_version": self.fake.version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path == "/inference/v1/generate":
            self._generate(body)
            return
        self.fake.called.append(self.path)
        if self.path == "/update_weight_version":
            self.fake.version = body["new_version"]
        if self.path == "/collective_rpc":
            self.fake.called[-1] = body["method"]
            if body["method"] == self.fake.refuses:
                self._answer(403, {"error": "closed"})
            elif body["method"] == "npd_load":
                self._answer(self.fake.load_status, {"results": [self.fake.loads(*body["args"])]})
            elif body["method"] in ("npd_clear", "npd_stage"):
                self._answer(200, {"results": [{}]})
            elif body["method"] == "npd_staged":
                self._answer(200, {"results": [self.fake.staged()]})
            else:
                found = {"vocab_size": VOCAB_SIZE, **self.fake.headers_of(*body.get("args", []) or [""])}
                self._answer(200, {"results": [found]})
        else:
            self._answer(200, {"success": True})

    def _generate(self, body: dict[str, Any]) -> None:
        if body["sampling_params"]["max_tokens"] > 1:
            self.fake.asked.append(body)
        trouble = self.fake.trouble(body)
        if self.fake.dead:
            self.close_connection = True  # without an answer
        elif isinstance(trouble, int | tuple):
            status, headers = trouble if isinstance(trouble, tuple) else (trouble, {})
            self._answer(status, {"error": {"message": "as the test wants it"}}, headers)
        elif isinstance(trouble, bytes):
            self._answer(200, trouble)
        else:
            choice = fake_answer(body, self.fake.version) | (trouble or {})
            self._answer(200, {"choices": [choice], "prompt_logprobs": fake_prompt_logprobs(body)})
            with self.fake.lock:
                self.fake.answered += body["sampling_params"]["max_tokens"] > 1


def die_after(server: FakeServer, answers: int) -> Trouble:
    """A trouble: the server stops answering anything after ``answers`` generate requests."""

    def trouble(body: dict[str, Any]) -> None:
        time.sleep(0.001)
        if len(server.asked) > answers and server.trouble is trouble:  # not where it was mended meanwhile
            server.dead = True

    return trouble


def write_prompts(path: Path, lengths: list[int], seed: int = 0, responses: Sequence[int] = ()) -> Path:
    """A sealed prompts directory with random prompts of these lengths, and responses; ids p0, p1, ..."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "prompt_id": f"p{i}",
            "prompt_ids": rng.integers(3, 300, length).tolist(),
            "generation_prompt_len": min(3, length),
            "teacher_prompt_ids": [1, 2, 3] if i % 3 == 0 else None,
            "response": f"The answer is #### {i}",
            "response_ids": [*rng.integers(3, 300, responses[i] - 1).tolist(), EOS] if responses else None,
            "extras": "{}",
        }
        for i, length in enumerate(lengths)
    ]
    with writing(path) as directory:
        pq.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA), directory / PROMPTS_FILE)
        seal(
            directory,
            kind="prompts",
            provenance={"stop_ids": [EOS]},
            counts={"in": len(rows), "kept": len(rows), "quarantined": {}, "pending": 0},
        )
    return path

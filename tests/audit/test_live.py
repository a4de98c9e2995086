"""The live page: what it shows while a run goes on, what it gives to whom, and what damage does to it."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_npd.audit import live as live_module
from megatron_npd.audit.live import LivePage, LiveServer, serve
from megatron_npd.audit.report import write_report
from megatron_npd.cli.report import main
from megatron_npd.errors import UserError
from megatron_npd.run_dir import RunDir
from tests.audit.test_report import STEPS, make_selection, metrics, write_lines
from tests.audit.test_status import begin
from tests.helpers import hear_interrupts

REFRESH = '<meta http-equiv="refresh" content="5">'


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html[html.index("<body>") :]).split())


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has trained: its first round is selected and has metrics."""
    run = begin(tmp_path / "run")
    make_selection(run.root, 0, kept=930)
    write_lines(run.metrics, metrics()[:STEPS])
    return run


def test_a_run_without_results_shows_its_stages_alone(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    html = LivePage(run.root).html()
    assert REFRESH in html
    assert text_of(html).startswith("Run run runner none on this machine Stages stage state run: prompts done")
    last = [f"policy v0002: {stage} done" for stage in ("evaluate", "held-out rollout", "measure")]
    assert text_of(html).endswith(" ".join(["round 1: export to do", *last]))
    assert "Settings" not in html and "Not in this report" not in html and "<svg" not in html
    assert not list(run.report.iterdir())  # nothing is written


def test_it_is_the_report_below_what_the_run_does(run: RunDir) -> None:
    write_report(run.root)
    saved = (run.report / "report.html").read_text()
    html = LivePage(run.root).html()
    assert REFRESH in html and "http-equiv" not in saved and "<a href=" in saved
    assert "<a " not in html and "src=" not in html  # nothing else is served
    for section in ("Training", "Selection", "Settings", "Not in this report"):
        assert f"<h2>{section}</h2>" in html and f"<h2>{section}</h2>" in saved
    assert html.index("<h2>Now</h2>") < html.index("<h2>Stages</h2>") < html.index("<h2>Training</h2>")
    assert "<h2>Stages</h2>" not in saved and html.count("<svg") == saved.count("<svg") > 0
    assert "policy lag 0.080 (bound 0.1) nats per token" in text_of(html)
    assert (run.report / "report.html").read_text() == saved


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each drawing; nothing is saved on them."""
    found: list[Any] = []
    draw = live_module.draw

    def counted(run: RunDir) -> Any:
        found.append(run)
        return draw(run)

    monkeypatch.setattr(live_module, "draw", counted)
    monkeypatch.setattr(live_module, "_LEAST_PAUSE", 0)
    return found


def test_it_is_made_anew_only_where_files_changed(run: RunDir, draws: list[Any]) -> None:
    page = LivePage(run.root)
    first = page.html()
    assert page.html() is first and len(draws) == 1
    changes = [
        lambda: write_lines(run.metrics, metrics()[: STEPS + 1]),
        lambda: (run.rollouts(1) / "shard-00000").mkdir(parents=True),
        lambda: (run.rollouts(1) / "responses-00000.journal").write_text("settings\n"),
        lambda: (run.rollouts(1) / "shard-00000" / "manifest.json").write_text("{}"),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        page.html()
        page.html()
        assert len(draws) == min(number, 4), number  # the last change is damage, which is found before


def test_figures_wait_and_stages_do_not(run: RunDir, draws: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is bounded to a share of the time; what waits is drawn later, also where no file changes any more."""
    monkeypatch.setattr(live_module, "_LEAST_PAUSE", 1e6)
    page = LivePage(run.root)
    page.html()
    write_lines(run.metrics, metrics()[: STEPS + 7])
    html = page.html()
    assert f"step {STEPS + 7} of 40" in html and f"{STEPS + 1} to {STEPS + 7}" not in html and len(draws) == 1
    page._due = 0.0
    assert f"{STEPS + 1} to {STEPS + 7}" in page.html() and len(draws) == 2
    page.html()
    assert len(draws) == 2


@pytest.mark.parametrize("damaged", ["report/metrics.jsonl", "config.json", "rounds/0000/selection/manifest.json"])
def test_damage_leaves_the_last_good_page(run: RunDir, draws: list[Any], damaged: str) -> None:
    page, path = LivePage(run.root), run.root / damaged
    good, content = page.html(), path.read_bytes()
    path.write_bytes(b"<b>{not json\n")
    html = page.html()
    assert "cannot be read just now" in html and "What is shown was read at" in html and REFRESH in html
    assert "<b>{" not in html
    assert text_of(good).partition("Run run")[2] == text_of(html).partition("Run run")[2]
    path.write_bytes(content)
    assert "cannot be read" not in page.html()
    os.rename(run.root, run.root.parent / "elsewhere")
    assert "What is shown was read at" in page.html()


def test_a_page_may_begin_with_damage(run: RunDir) -> None:
    """Of what the report reads; what is no run is refused."""
    (run.report / "accuracy.json").write_text("{")
    page = LivePage(run.root)
    html = page.html()
    assert "accuracy.json must hold JSON" in html and "What is shown" not in html and REFRESH in html
    (run.report / "accuracy.json").unlink()
    assert "<h2>Stages</h2>" in page.html()
    with pytest.raises(UserError, match=r"must be the directory of a run, got no config\.json"):
        LivePage(run.report)


@pytest.fixture
def server(run: RunDir) -> Iterator[LiveServer]:
    with LiveServer(LivePage(run.root), "127.0.0.1", "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: LiveServer, path: str = "/", method: str = "GET", host: str | None = "") -> tuple[int, Any, bytes]:
    """Status, headers and body; ``host`` empty: as a browser says it, None: no such header."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.putrequest(method, path, skip_host=host != "", skip_accept_encoding=True)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def test_the_page_alone_is_served(server: LiveServer) -> None:
    status, headers, body = ask(server)
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and b"<h2>Stages</h2>" in body
    assert headers["Cache-Control"] == "no-store" and "default-src 'none'" in headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in headers and "Python" not in headers["Server"]
    assert ask(server, method="HEAD")[::2] == (200, b"")
    for path in ("/report.html", "/config.json", "/report/", "/.", "/../config.json", "/%2e%2e/config.json"):
        assert ask(server, path)[::2] == (404, b"there is / alone\n"), path
    for path in ("/etc/passwd", "/?file=/etc/passwd", "http://localhost/", "*", "/favicon.ico"):
        assert ask(server, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        assert ask(server, method=method)[0] == 501, method


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("localhost", 200), ("LOCALHOST:9999", 200), ("127.0.0.1:1", 200), ("[::1]:8090", 200)),
        *((None, 403), ("evil.example", 403), ("127.0.0.1.evil.example:80", 403), ("evil.example:127.0.0.1", 403)),
        *(("localhost.evil.example", 403), ("[evil]", 403), ("localhost@evil", 403), ("10.0.0.1", 403)),
    ],
)
def test_other_names_are_refused(server: LiveServer, host: str | None, status: int) -> None:
    assert ask(server, host=host)[0] == status


def test_clients_that_go_away_or_say_nothing_hinder_nobody(server: LiveServer) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.server_address[1])) for _ in range(20)]
    silent[0].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    silent[0].close()
    silent[1].sendall(b"\xff\xfe nonsense\r\n\r\n")
    assert ask(server)[0] == 200
    for connection in silent:
        connection.close()


def test_the_command_serves_until_it_is_interrupted(run: RunDir) -> None:
    command = [sys.executable, "-m", "megatron_npd", "report", str(run.root), "--serve", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)
        assert found, url
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]))
        connection.request("GET", "/")
        assert b"<h2>Stages</h2>" in connection.getresponse().read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors and "not served any more" in errors
    assert not (run.report / "report.html").exists()


def test_what_cannot_be_served_is_refused(run: RunDir, tmp_path: Path) -> None:
    words = "must be a free one of this machine"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=words):
        serve(run.root, "127.0.0.1", taken.getsockname()[1], print)
    with pytest.raises(UserError, match="one interface"):
        serve(run.root, "0.0.0.0", 0, print)
    for flags, words in (
        (["--port", "0"], "must come with --serve"),
        (["--serve", "--port", "70000"], "from 0 to 65535"),
    ):
        with pytest.raises(UserError, match=words):
            main([str(run.root), *flags])
    with pytest.raises(UserError, match="must be the directory of a run"):
        main([str(tmp_path / "none"), "--serve", "--port", "0"])

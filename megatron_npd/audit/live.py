"""The report as a live page over HTTP: what the run is doing, then its report, made anew when its files changed."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from megatron_npd.audit.page import notice_page, page
from megatron_npd.audit.report import draw, svgs
from megatron_npd.audit.status import find_run, is_held, read_status
from megatron_npd.lock import LOCK
from megatron_npd.log import get_logger
from megatron_npd.serving.interface import listen_on

_DEPTH = 4  # names below the run's root that are looked at: files in deeper directories change these by their own name
_LEAST_PAUSE = 20  # between two drawings, in the time that one takes: the run has better use for the processor
_CLIENT_SECONDS = 10.0  # that a client may take for its request
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LivePage:
    """The page of a run, for several threads; what cannot be read leaves the last good page, with a line that says so.

    Args:
        run_dir: Directory of the run.

    Raises:
        UserError: It is none.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run = find_run(run_dir)
        self._lock = threading.Lock()
        self._seen: Any = None  # what the page was made from
        self._html = ""
        self._good: Callable[[str], str] = lambda notice: notice_page(self.run, notice)
        self._drawn: tuple[dict[str, Any], dict[str, str]] | None = None
        self._due = 0.0  # when figures may be drawn again

    def html(self) -> str:
        """The page as it is now."""
        with self._lock:
            if (seen := _state(self.run.root)) != self._seen:
                self._seen = seen if self._make() else None
            return self._html

    def _make(self) -> bool:
        """Make the page; whether all of it is as new as the files."""
        try:
            status = read_status(self.run.root)
            if fresh := self._drawn is None or time.monotonic() >= self._due:
                start = time.monotonic()
                summary, figures = draw(self.run)
                self._drawn = summary, svgs(figures)
                self._due = time.monotonic() + _LEAST_PAUSE * (time.monotonic() - start)
            assert self._drawn is not None
            summary, shown = self._drawn
            now = datetime.now(UTC).strftime("%H:%M:%S UTC")
            self._html = page(self.run, summary, shown, status)
            self._good = lambda notice: page(
                self.run, summary, shown, status, f"{notice} What is shown was read at {now}."
            )
            return fresh
        except Exception as error:  # whatever half-written files lead to: the page outlives it
            get_logger().warning("the run's files cannot be read: %s", words := _words(error))
            self._html = self._good(f"The run's files cannot be read just now: {words}.")
            return True


def serve(run_dir: str | Path, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve the live page of a run until Ctrl-C.

    Args:
        run_dir: Directory of the run.
        host: Name or address of the interface to listen on.
        port: Port to listen on; 0: a free one.
        announce: Called with the page's URL once it is served.

    Raises:
        UserError: It is no run, or the interface or port cannot be had.
    """
    live = LivePage(run_dir)
    address, free = listen_on(host, port)
    with LiveServer(live, host, address, free) as server:
        announce(server.url)
        if not ipaddress.ip_address(address).is_loopback:
            get_logger().warning("whoever reaches %s over the network can read the report", server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            get_logger().info("the page is not served any more; the run goes on by itself")


class LiveServer(ThreadingHTTPServer):
    """Answers ``/`` with the page, and nothing else; nothing is read that a request names.

    Args:
        live: The page.
        host: As it was given; a name by which browsers may ask, beside the address and this machine's own.
        address: What it listens on.
        port: 0: a free one.
    """

    daemon_threads = True

    def __init__(self, live: LivePage, host: str, address: str, port: int) -> None:
        self.live = live
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.names = {host.lower(), address, "localhost", "127.0.0.1", "::1"}
        super().__init__((address, port), _Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of this machine's name, which may take seconds."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are no news."""
        get_logger().debug("a request from %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_SECONDS

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def version_string(self) -> str:
        return "npd"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        assert isinstance(self.server, LiveServer)
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or _name(hosts[0]) not in self.server.names:
            # A page of another site whose name was made to mean this address (DNS rebinding) asks by that name.
            self._send(403, "text/plain", "ask by the URL that npd report printed\n")
        elif self.path != "/":
            self._send(404, "text/plain", "there is / alone\n")
        else:
            self._send(200, "text/html", self.server.live.html())

    def _send(self, status: int, kind: str, text: str) -> None:
        data = text.encode(errors="replace")  # a path may be no UTF-8
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": f"{kind}; charset=utf-8"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _name(host: str) -> str:
    """The name or address of a Host header, without its port: a tunnel may have another one."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _words(error: Exception) -> str:
    return str(error) if str(error) else type(error).__name__


def _state(root: Path) -> tuple[Any, ...]:
    """What changes when a run's files do: names, times and sizes of all that is not too deep, and a held lock."""
    found: list[tuple[str, int, int]] = []

    def look(directory: Path, depth: int) -> None:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    about = entry.stat(follow_symlinks=False)
                    found.append((entry.path, about.st_mtime_ns, about.st_size))
                    if depth < _DEPTH and entry.is_dir(follow_symlinks=False):
                        look(Path(entry.path), depth + 1)
        except OSError:  # moved or removed meanwhile: the next look is another one
            found.append((str(directory), 0, -1))

    look(root, 1)
    return (is_held(root / LOCK), *sorted(found))

"""Many requests over the servers of a pool at once: retries, probes, lost servers, and caches that hold NaN.

By aiohttp: its client takes a tenth of httpx's CPU time per request, which was as much as vLLM's for a small model.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import aiohttp

from megatron_npd.log import get_logger
from megatron_npd.serving.load import Load, waiting_requests
from megatron_npd.serving.protocol import UNDEFINED, Failure, Malformed, check_ids, field, first_of, json_of
from megatron_npd.serving.server import GENERATE, PROBE, ServerLost
from megatron_npd.stoppable import stopping

if TYPE_CHECKING:
    from megatron_npd.serving.pool import ServerPool

Asked = TypeVar("Asked")
Read = TypeVar("Read")
CONTROL_TIMEOUT = 60.0  # seconds, of requests that generate at most one token
_RETRY_DELAYS = (0.2, 1.0)  # seconds, after a connection broke, or an answer that another try may better
_LONGEST_DELAY = 30.0  # seconds, of what a server may ask for in Retry-After
_LOOK_SECONDS = 5.0  # between two looks for a lost server
_QUEUE_SECONDS = 1.0  # between two looks at a server's queue
_PARK_SECONDS = 0.2  # between two looks of a worker that is too many whether it still is
_KEEP_SECONDS = 4.0  # of a connection that is not used: vLLM closes it after 5
_STOP_SECONDS = 0.2  # between two looks whether this thread was asked to stop
_MOST_LOST = 3  # servers that a request may see lost, the last one while it is alone there
_REFUSALS = frozenset(range(400, 500)) - {408, 425, 429}  # what another try would not change


class Asking(Generic[Asked, Read]):
    """One call of ``ServerPool.ask``; arguments as for it."""

    def __init__(
        self,
        pool: ServerPool,
        on_result: Callable[[Asked, Read | Failure], None],
        body: Callable[[Asked], dict[str, Any]],
        read: Callable[[Asked, Any, int], Read | Failure],
    ) -> None:
        self.pool, self.on_result, self.body, self.read = pool, on_result, body, read
        self.vocab_size = pool.vocab_size()
        self.again: deque[Asked] = deque()  # had an undefined answer once; what has two is the model's
        self.returned: deque[tuple[Asked, int]] = deque()  # in flight on a server that was lost, and how often
        self.suspects: deque[tuple[Asked, int]] = deque()  # so often that each is asked alone, at the end

    def run(self, requests: Iterable[Asked]) -> None:
        """Ask until every request has its result."""
        waiting, concurrency = iter(requests), self.pool.cfg.concurrency
        while True:
            undefined = asyncio.run(self._work(waiting, concurrency))
            for url in {url for url, _ in undefined} & {*self.pool.urls}:
                get_logger().warning("%s gave an undefined log-probability: its cache is cleared", url)
                self._clear(url)
            self.again.extend(request for _, request in undefined)
            if not self.again and not self.returned:
                if not self.suspects:
                    return
                self.returned, self.suspects, concurrency = self.suspects, deque(), 1

    def _clear(self, url: str) -> None:
        try:
            self.pool.clear(url)
            self.pool.check_defined(url)
        except ServerLost as error:
            self.pool.lose(url, error)

    async def _work(self, requests: Iterator[Asked], concurrency: int) -> list[tuple[str, Asked]]:
        """Ask until there is no request or no healthy server left; sick servers and what to ask again.

        Raises:
            ServerLost: No server was left for ``cfg.server_patience``; what it worked on is in ``returned``.
        """
        undefined: list[tuple[str, Asked]] = []
        busy: set[str] = set()  # servers whose workers are at work
        drained = False

        async def worker(client: aiohttp.ClientSession, url: str, number: int, load: Load) -> None:
            nonlocal drained
            for _ in range(number):  # no server has its second request before each has one
                await asyncio.sleep(0)
            while all(url != sick for sick, _ in undefined):
                if number >= load.limit and not drained:
                    await asyncio.sleep(_PARK_SECONDS)
                    continue
                again, lost = bool(self.again), 0
                try:
                    if again:
                        request = self.again.popleft()
                    else:
                        request, lost = self.returned.popleft() if self.returned else (next(requests), 0)
                except StopIteration:
                    drained = True
                    return
                load.in_flight += 1
                try:
                    result = await self._result(client, url, request)
                except (ServerLost, asyncio.CancelledError) as error:
                    if isinstance(error, ServerLost) or url in self.pool.lost:
                        self._give_back(request, lost + 1)
                    raise
                except aiohttp.ClientError:  # of a server that is there again: it was restarted meanwhile
                    self._give_back(request, lost + 1)
                    continue
                finally:
                    load.in_flight -= 1
                if isinstance(result, Failure) and result.reason == UNDEFINED and not again:
                    undefined.append((url, request))
                else:
                    self.on_result(request, result)

        async def crew(url: str) -> None:
            """A server's workers, and again once it was lost and is found."""
            while url not in self.pool.lost or await self._found(url, busy):
                busy.add(url)
                load = Load(concurrency)
                async with self._client() as client:
                    workers = [asyncio.create_task(worker(client, url, number, load)) for number in range(concurrency)]
                    watch = asyncio.create_task(self._watch_queue(client, url, load))
                    try:
                        await asyncio.gather(*workers)
                        return
                    except ServerLost as error:
                        self.pool.lose(url, error)
                    finally:
                        busy.discard(url)
                        for task in (*workers, watch):
                            task.cancel()
                        ended = await asyncio.gather(*workers, watch, return_exceptions=True)
                for error in ended:
                    if isinstance(error, Exception) and not isinstance(error, ServerLost):
                        raise error  # of on_result, while they were cancelled

        crews = [asyncio.create_task(crew(url)) for url in [*self.pool.urls, *self.pool.lost]]
        watch = asyncio.create_task(_cancel_when_stopping(crews))
        try:
            await asyncio.gather(*crews)
        finally:
            for task in (*crews, watch):
                if not task.cancelling():  # a second time would end the closing of its client
                    task.cancel()
            await asyncio.gather(*crews, watch, return_exceptions=True)
        if not self.pool.urls:
            raise next(iter(self.pool.lost.values()))
        return undefined

    def _client(self) -> aiohttp.ClientSession:
        """A client of one server, with a connection for each request in flight."""
        options = self.pool.client_options()
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS, ssl=options["verify"]),
            timeout=_timeout(self.pool.cfg.request_timeout),
            headers=options["headers"],
            trust_env=options["trust_env"],
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _watch_queue(self, client: aiohttp.ClientSession, url: str, load: Load) -> None:
        """Give a server no more than it works on, as long as it says what waits in its queue."""
        while True:
            await asyncio.sleep(_QUEUE_SECONDS)
            try:
                async with client.get(
                    url + "/metrics", allow_redirects=False, timeout=_timeout(CONTROL_TIMEOUT)
                ) as response:
                    text = (await response.read()).decode(errors="replace")
            except aiohttp.ClientError:  # its requests find out what the matter is
                continue
            waiting = waiting_requests(text) if response.status == 200 else None
            if waiting is None:
                return
            load.see(waiting)

    async def _found(self, url: str, busy: set[str]) -> bool:
        """Look for a lost server until it is there again, or there is nothing for it to do, or no hope."""
        alone = time.monotonic()  # since when no server is left
        while not await self._find(url):
            if self.pool.urls:
                alone = time.monotonic()
                if not busy:
                    return False
            elif url in self.pool.servers or time.monotonic() - alone >= self.pool.cfg.server_patience:
                return False
            await asyncio.sleep(_LOOK_SECONDS if self.pool.urls else min(_LOOK_SECONDS, self.pool.cfg.server_patience))
        return True

    async def _find(self, url: str) -> bool:
        """``ServerPool.find`` in a thread; nobody waits for a server that starts when the round ends."""
        try:
            return await asyncio.to_thread(self.pool.find, url)
        except asyncio.CancelledError:
            if url in self.pool.servers and url in self.pool.lost:
                self.pool.servers[url].stop()
            raise

    def _give_back(self, request: Asked, lost: int) -> None:
        """Have what was in flight on a lost server answered by another, unless it may be what brings them down."""
        if lost < _MOST_LOST:
            (self.suspects if lost == _MOST_LOST - 1 else self.returned).append((request, lost))
        else:
            self.on_result(request, Failure(reason="server_lost", detail=f"in flight on {lost} servers that were lost"))

    async def _result(self, client: aiohttp.ClientSession, url: str, request: Asked) -> Read | Failure:
        """What a server makes of a request, after some tries.

        Raises:
            ServerLost: The server makes nothing of a trivial request either.
            aiohttp.ClientError: It does, but its connections broke.
        """
        trouble, broken = "", None
        body = self.body(request)
        for delay in (*_RETRY_DELAYS, None):
            asked_for, broken = 0.0, None
            try:
                async with client.post(url + GENERATE, json=body, allow_redirects=False) as response:
                    content = await response.read()
                if response.status == 401:
                    raise self.pool.unauthorised(url)
                if response.status == 200:
                    return self.read(request, json_of(content), self.vocab_size)
                trouble = f"{response.status}: {detail(content)}"
                if response.status in _REFUSALS:
                    return Failure(reason="request_failed", detail=trouble)
                asked_for = _retry_after(response.headers.get("Retry-After", "0"))
            except TimeoutError as error:
                await self._probe(client, url, f"got {words(error)}")
                return Failure(reason="timeout", detail=f"no answer in {self.pool.cfg.request_timeout:.0f} s")
            except aiohttp.ClientError as error:
                trouble, broken = words(error), error
            except Malformed as error:
                trouble = f"an answer that is none: {error}"
            if delay is not None:
                await asyncio.sleep(max(delay, asked_for))
        await self._probe(client, url, f"got {trouble}")
        if broken is not None:
            raise broken
        return Failure(reason="request_failed", detail=trouble)

    async def _probe(self, client: aiohttp.ClientSession, url: str, trouble: str) -> None:
        """Raise ServerLost unless the server still generates a token: then the request was at fault."""
        seconds = min(CONTROL_TIMEOUT, self.pool.cfg.request_timeout)
        try:
            options: dict[str, Any] = {"json": PROBE, "allow_redirects": False, "timeout": _timeout(seconds)}
            async with client.post(url + GENERATE, **options) as response:
                response.raise_for_status()
                choice = first_of(field(json_of(await response.read()), "choices"), "choices")
            check_ids(field(choice, "token_ids"), self.vocab_size)
        except TimeoutError as error:
            raise self.pool.dead(
                url, f"must generate, got no token in {seconds:.0f} s: it hangs ({trouble})"
            ) from error
        except (aiohttp.ClientError, Malformed) as error:
            raise self.pool.dead(url, f"must generate, {trouble}, then {words(error)}") from error


async def _cancel_when_stopping(tasks: Sequence[asyncio.Task[None]]) -> None:
    while not stopping():
        await asyncio.sleep(_STOP_SECONDS)
    for task in tasks:
        task.cancel()


def _timeout(seconds: float) -> aiohttp.ClientTimeout:
    """Of a request whose answer may take so long."""
    return aiohttp.ClientTimeout(total=None, sock_connect=CONTROL_TIMEOUT, sock_read=seconds)


def words(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__} {error}".strip()


def detail(content: bytes) -> str:
    """The start of what a server says, in one line."""
    return " ".join(content.decode(errors="replace").split())[:300]


def _retry_after(text: str) -> float:
    """Seconds that a server asks to wait, given as a number or as a date, up to a limit."""
    try:
        date = email.utils.parsedate_to_datetime(text).timestamp() if not text[:1].isdigit() else None
        seconds = float(text) if date is None else date - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), _LONGEST_DELAY)

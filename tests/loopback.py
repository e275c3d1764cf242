"""A web server on loopback that answers well, badly or never, and counts what it was asked."""

import asyncio
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self

Handler = Callable[[asyncio.StreamWriter, dict[str, str]], Awaitable[None]]


def answer(
    body: bytes = b"", status: str = "200 OK", kind: str = "image/jpeg", **headers: str
) -> bytes:
    """A whole HTTP/1.1 answer. Header names are given with _ for -."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Site:
    """What a path answers: bytes, or a coroutine that writes as it likes. Counts every request."""

    pages: dict[str, bytes | Handler]
    host: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    asked: Counter[str] = field(default_factory=Counter)
    began: list[float] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    connections: int = 0
    port: int = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    def url(self, path: str) -> str:
        return f"http://{self.host}:{self.port}{path}"

    def _serve(self, started: threading.Event) -> None:
        self._loop.run_until_complete(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._end = asyncio.Event()
        server = await asyncio.start_server(self._connected, self.host, self.port, ssl=self.tls)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._end.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while request := await _head(reader):
                path = request.pop(":path")
                self.asked[path] += 1
                self.began.append(time.monotonic())
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    page = self.pages.get(path, answer(status="404 Not Found"))
                    if isinstance(page, bytes):
                        writer.write(page)
                        await writer.drain()
                    else:
                        await page(writer, request)
                finally:
                    self.open -= 1
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> dict[str, str]:
    """The headers of the next request and its `:path`; empty at the end of the connection."""
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return {}
    first, *lines = text.strip().split("\r\n")
    pairs = (line.partition(":")[::2] for line in lines)
    return {name.strip().lower(): value.strip() for name, value in pairs} | {
        ":path": first.split()[1]
    }


async def trickle(writer: asyncio.StreamWriter, request: dict[str, str]) -> None:
    """An answer that never ends, a few bytes at a time."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def flood(writer: asyncio.StreamWriter, request: dict[str, str]) -> None:
    """An answer that never ends, as fast as it is read."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def silent(writer: asyncio.StreamWriter, request: dict[str, str]) -> None:
    """No answer at all."""
    await asyncio.sleep(3600)


async def dropped(writer: asyncio.StreamWriter, request: dict[str, str]) -> None:
    """The connection ends before the answer does."""
    writer.write(answer(b"\xff\xd8\xff" + b"x" * 1000)[:-500])
    await writer.drain()
    writer.close()

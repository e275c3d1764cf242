"""URL lists: URLs a second from a server on loopback, by connections and by its latency.

The whole step of `ingest` is timed: list, robots.txt, checks of every address, bytes, hashes, tar.
The last table has a list in which a part of the URLs are slow, endless, too large or wrong.

    python -m benchmarks.urls
"""

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.measuring import machine, table, target, timed
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor
from curation.runtime.store import Entry, open_store, read_table
from curation.stages import fetch
from curation.web.fetcher import FetchConfig

IMAGE_BYTES = 30_000
TIMEOUT_S = 2.0
CONFIG = FetchConfig(
    user_agent="lvd/0.1",
    robots=True,
    deny=("evil.example",),
    allow_networks=("127.0.0.0/8",),
    connections=64,
    host_connections=1024,
    host_delay_s=0.0,
    timeout_s=TIMEOUT_S,
    retries=0,
    max_bytes=1_000_000,
)
MIXED = ("good",) * 14 + ("slow", "endless", "large", "page", "missing", "inside")


def serve(ready: Connection) -> None:
    """In a process of its own: `/KIND/LATENCY_MS/NUMBER` answers so, after so long."""
    asyncio.run(_serve(ready))


async def _serve(ready: Connection) -> None:
    body = b"\xff\xd8\xff" + np.random.default_rng(0).bytes(IMAGE_BYTES - 3)
    answers = {
        "good": _answer("200 OK", "image/jpeg", body),
        "slow": _answer("200 OK", "image/jpeg", body),
        "large": _answer("200 OK", "image/jpeg", bytes(2_000_000)),
        "page": _answer("200 OK", "text/html", b"<html>"),
        "inside": _answer("302 Found\r\nLocation: http://10.0.0.1/x", "text/html", b""),
    }

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                _, kind, latency_ms, *_ = [*head.split()[1].decode().split("/"), "0", "0"]
                await asyncio.sleep(float(latency_ms) / 1000)
                if kind == "slow":
                    await asyncio.sleep(TIMEOUT_S / 2)
                if kind == "endless":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff")
                    while True:
                        writer.write(b"x")
                        await writer.drain()
                        await asyncio.sleep(0.05)
                writer.write(answers.get(kind, _answer("404 Not Found", "text/html", b"")))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await asyncio.Event().wait()


def _answer(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def fetched(urls: list[str], cfg: FetchConfig) -> tuple[float, float, Counter[str]]:
    """Seconds, milliseconds of processor time a URL, and how many URLs had which outcome."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_text("\n".join(urls))
        lists = [(folder, Entry(path.name, path.stat().st_size, "1"))]
        store = open_store(f"{folder}/run")
        events = Events(store)
        how = fetch.Fetching(cfg, fetch.Budget(1.0, 0))
        with events.stage("ingest"):
            seconds, (tables,) = timed(
                fetch.run, how, lists, 1000, store, InProcessExecutor(), events
            )
        found: Counter[str] = Counter()
        for name in tables:
            faults = read_table(store, name, ["fault"])["fault"].to_pylist()
            found.update((fault or "an image").split()[0] if fault else "image" for fault in faults)
    return seconds, 1000 * (time.process_time() - began) / len(urls), found


def plain(urls: list[str]) -> tuple[float, float]:
    """The same by aiohttp alone: no checks, no hash, nothing kept."""

    async def every() -> None:
        slots = asyncio.Semaphore(CONFIG.connections)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(url: str) -> None:
                async with slots, session.get(url) as response:
                    await response.read()

            await asyncio.gather(*map(one, urls))

    began = time.process_time()
    seconds, _ = timed(lambda: asyncio.run(every()))
    return seconds, 1000 * (time.process_time() - began) / len(urls)


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.urls", description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="about, for each line")
    seconds = parser.parse_args(arguments).seconds
    print(machine(), "\n", flush=True)
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    site = f"http://127.0.0.1:{ours.recv()}"
    try:
        return _by_connections(site, seconds) + _mixed(site)
    finally:
        server.terminate()
        server.join()


def _by_connections(site: str, about_s: float) -> int:
    fetched([f"{site}/good/0/{n}" for n in range(200)], CONFIG)  # imports, first use
    lines: list[list[object]] = []
    missed = 0
    for latency_ms in (0, 20, 100):
        for connections in (1, 8, 64, 256):
            ideal = connections / (latency_ms / 1000) if latency_ms else 2000.0
            count = int(min(ideal, 1500) * about_s) + 1
            urls = [f"{site}/good/{latency_ms}/{n}" for n in range(count)]
            seconds, cpu_ms, found = fetched(urls, replace(CONFIG, connections=connections))
            missed += found["image"] != count
            rate = count / seconds
            mb, each = f"{rate * IMAGE_BYTES / 1e6:.0f}", f"{rate / connections:.1f}"
            share = f"{rate / ideal:.2f}" if latency_ms else ""
            line: list[object] = [
                latency_ms,
                connections,
                count,
                f"{rate:.0f}",
                mb,
                each,
                share,
                f"{cpu_ms:.2f}",
            ]
            lines.append(line)
            if (latency_ms, connections) == (20, CONFIG.connections):
                seconds, cpu_ms = plain(urls)
                alone = [f"{count / seconds:.0f}", "", "", "", f"{cpu_ms:.2f}"]
                lines.append([latency_ms, "aiohttp alone", count, *alone])
    head = ["latency ms", "connections", "URLs", "URLs/s", "MB/s"]
    table([*head, "URLs/s a connection", "of connections / latency", "CPU ms a URL"], lines)
    return missed + target("every URL of these lists gave its image", missed == 0)


def _mixed(site: str) -> int:
    urls = [f"{site}/{kind}/20/{n}" for n, kind in enumerate(MIXED * 100)]
    seconds, _, found = fetched(urls, CONFIG)
    held = 100 * (TIMEOUT_S + TIMEOUT_S / 2) / CONFIG.connections
    table(["outcome", "URLs"], found.most_common())
    print(f"{len(urls)} URLs in {seconds:.1f} s; the slow and endless alone hold {held:.1f} s\n")
    wanted = {"image": 1500, "url_timeout": 100, "url_too_large": 100, "url_not_an_image": 100}
    wanted |= {"url_404": 100, "url_private_address": 100}
    return target("each kind of answer has its outcome", dict(found) == wanted)


if __name__ == "__main__":
    sys.exit(main())

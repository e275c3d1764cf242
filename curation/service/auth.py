"""Bearer tokens with a read and a submit scope. Without any, reading is free on loopback alone."""

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from curation.runtime.store import StoreError, read_uri

Scope = Literal["read", "submit"]
COOKIE = "lvd_token"
SHORTEST = 16
UNAUTHORIZED = "give a token: `Authorization: Bearer TOKEN`"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
VARIABLES: dict[Scope, str] = {"read": "LVD_READ_TOKENS", "submit": "LVD_SUBMIT_TOKENS"}


class ServiceError(Exception):
    """A service that can't be started as asked: one line for people."""


@dataclass(frozen=True)
class Tokens:
    """Digests of the tokens: they never lie in memory in the clear, nor in any message."""

    digests: tuple[tuple[bytes, Scope], ...] = ()

    def scopes(self, token: str) -> frozenset[Scope]:
        """What a token allows; the time it takes tells nothing about the right ones."""
        given = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found: set[Scope] = set()
        for digest, scope in self.digests:
            if hmac.compare_digest(given, digest):
                found |= {"read", scope}
        return frozenset(found)

    def __bool__(self) -> bool:
        return bool(self.digests)


def read_tokens(file: str | None) -> Tokens:
    """From a file (a line each: `read TOKEN` or `submit TOKEN`) and the environment.

    LVD_READ_TOKENS and LVD_SUBMIT_TOKENS hold tokens with spaces or commas between. Raises
    ServiceError, which names the line but never the token.
    """
    found: list[tuple[str, Scope]] = []
    for scope, variable in VARIABLES.items():
        for token in os.environ.get(variable, "").replace(",", " ").split():
            found.append((_checked(token, variable), scope))
    if file is not None:
        found += _of_file(file)
    return Tokens(tuple((hashlib.sha256(t.encode()).digest(), scope) for t, scope in found))


def _of_file(file: str) -> Iterable[tuple[str, Scope]]:
    try:
        lines = read_uri(file).decode("utf-8", "replace").splitlines()
    except StoreError as error:
        raise ServiceError(f"--tokens: {error}") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] not in VARIABLES:
            raise ServiceError(
                f"--tokens {file}, line {number}: write `read TOKEN` or `submit TOKEN`"
            )
        scope: Scope = "read" if words[0] == "read" else "submit"
        yield _checked(words[1], f"--tokens {file}, line {number}"), scope


def _checked(token: str, where: str) -> str:
    if len(token) < SHORTEST:
        raise ServiceError(
            f"{where}: a token needs at least {SHORTEST} characters; `openssl rand -hex 24`"
        )
    return token


def require_safe(host: str, tokens: Tokens) -> None:
    """Others may reach a service only with tokens. Raises ServiceError."""
    if host not in LOOPBACK and not tokens:
        raise ServiceError(
            f"--host {host}: others can reach this, so it needs tokens: --tokens FILE, or"
            f" {VARIABLES['read']} and {VARIABLES['submit']}; only 127.0.0.1 goes without"
        )


_bearer = HTTPBearer(auto_error=False, description="A token with the scope `read` or `submit`.")


async def _scopes(
    request: Request,
    _: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],  # for the OpenAPI
) -> frozenset[Scope]:
    """What the request may do; browsers send the token as a cookie that scripts can't read."""
    return allowed(request, request.app.state.tokens)


def allowed(request: Request, tokens: Tokens) -> frozenset[Scope]:
    """By the bearer token or else the cookie; without any tokens to have, reading is free."""
    if not tokens:
        return frozenset({"read"})
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")
    return tokens.scopes(given)


Scopes = Annotated[frozenset[Scope], Depends(_scopes)]


async def reads(scopes: Scopes) -> None:
    """For every call that reads."""
    if "read" not in scopes:
        raise HTTPException(401, UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})


async def submits(scopes: Scopes) -> None:
    """For calls that make the cluster work: never without a token that says so."""
    if "read" not in scopes:
        await reads(scopes)
    if "submit" not in scopes:
        raise HTTPException(403, "this needs a token with the scope `submit`; see --tokens")

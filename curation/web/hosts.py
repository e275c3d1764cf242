"""Manners towards each host: a pause between requests, few at a time, none after many failures."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

GIVE_UP = 10  # failed answers in a row: the host is taken for dead
REMEMBERED = 10_000  # hosts, of those that nobody is waiting for
LONGEST_PAUSE_S = 60.0  # what a robots.txt may ask for


@dataclass
class _Host:
    turns: asyncio.Semaphore
    users: int = 0
    next_start: float = 0.0
    failures: int = 0
    start: asyncio.Lock = field(default_factory=asyncio.Lock)


class Hosts:
    """At most `connections` requests to a host at a time, begun at least `delay_s` apart."""

    def __init__(self, connections: int, delay_s: float) -> None:
        self._connections, self._delay_s = connections, delay_s
        self._hosts: dict[str, _Host] = {}

    @contextlib.asynccontextmanager
    async def turn(self, name: str, pause_s: float = 0.0) -> AsyncIterator[None]:
        """One request to a host, when it is its turn. `pause_s`: what the host itself asks for."""
        host = self._hosts.setdefault(name, _Host(asyncio.Semaphore(self._connections)))
        pause = max(self._delay_s, min(pause_s, LONGEST_PAUSE_S))
        host.users += 1
        try:
            async with host.turns:
                async with host.start:
                    await asyncio.sleep(max(0.0, host.next_start - time.monotonic()))
                    host.next_start = time.monotonic() + pause
                yield
        finally:
            host.users -= 1
            self._forget()

    def failed(self, name: str) -> None:
        """The host gave no answer."""
        if name in self._hosts:
            self._hosts[name].failures += 1

    def answered(self, name: str) -> None:
        """The host gave an answer, whichever."""
        if name in self._hosts:
            self._hosts[name].failures = 0

    def dead(self, name: str) -> bool:
        """Whether the last GIVE_UP requests to the host all failed."""
        return name in self._hosts and self._hosts[name].failures >= GIVE_UP

    def _forget(self) -> None:
        """Drops hosts that nobody waits for, when there are many: lists name millions."""
        if len(self._hosts) <= 2 * REMEMBERED:
            return
        now = time.monotonic()
        idle = [
            name
            for name, host in self._hosts.items()
            if not host.users and host.next_start < now and host.failures < GIVE_UP
        ]
        for name in idle[:REMEMBERED]:
            del self._hosts[name]


def is_within(host: str, domains: Iterable[str]) -> bool:
    """Whether a host is one of the domains or below one."""
    labels = host.lower().rstrip(".").split(".")
    return any(".".join(labels[at:]) in domains for at in range(len(labels)))

"""One writer at a time on S3: an object that its holder writes again every few seconds.

Each write is conditional on the one before, so that of two that want the run one gets it. The lock
of a holder that was killed is no longer renewed, and is taken over. On a store that knows no
conditional writes nobody is kept out.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator

from curation.runtime.s3 import S3Store
from curation.runtime.store import StoreError

LOCK = ".lock"
BEAT_S = 10.0
LOST = signal.SIGUSR1  # also ends a wait, which an interrupt from within Python does not
LEASE_S = 60.0  # without a beat, after which the holder counts as dead


@contextlib.contextmanager
def lease(store: S3Store) -> Iterator[None]:
    """Holds the run of `store`. Raises StoreError when another process writes it, or took it.

    Only the main thread can hold one: it is the one that a lost lock interrupts.
    """
    beat = _Beat(store, _acquire(store))
    # Not SIGINT, which scripts have ignored in what they start in the background.
    before = signal.signal(LOST, _interrupt)
    beat.start()
    try:
        yield
    except KeyboardInterrupt:
        if beat.lost:
            raise StoreError(
                f"{store.uri}: another process writes this run since this one could not reach the"
                f" store for {LEASE_S:g} s; wait for it, then run again"
            ) from None
        raise
    finally:
        beat.end()
        signal.signal(LOST, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _sign() -> bytes:
    """Who holds the lock; no two are equal."""
    who = {"host": socket.gethostname(), "pid": os.getpid(), "sign": secrets.token_hex(8)}
    return json.dumps(who).encode()


def _acquire(store: S3Store) -> str:
    """The version of the lock, once it is ours."""
    seen = ""
    while (version := store.write_if(LOCK, _sign(), "")) is None:
        there = store.age(LOCK)
        if there is not None:  # else it went just now
            entry, age_s = there
            if seen not in ("", entry.version):
                raise StoreError(f"{store.uri}: another process is writing this run; wait for it")
            seen = entry.version
            if age_s > LEASE_S:
                version = store.write_if(LOCK, _sign(), seen)
                if version is not None:
                    return version
        time.sleep(min(BEAT_S / 4, 1.0))
    return version


class _Beat(threading.Thread):
    """Renews the lock; interrupts the main thread when it was lost."""

    def __init__(self, store: S3Store, version: str) -> None:
        super().__init__(daemon=True)
        self._store, self._version = store, version
        self._ended = threading.Event()
        self.lost = False

    def run(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(StoreError):  # the store may answer the next time
                version = self._store.write_if(LOCK, _sign(), self._version)
                if version is None:
                    self.lost = True
                    signal.pthread_kill(threading.main_thread().ident or 0, LOST)
                    return
                self._version = version

    def end(self) -> None:
        self._ended.set()
        self.join()
        if not self.lost:
            self._store.delete(LOCK)

"""What is kept between requests: values by key within a budget, and values that age."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")


class Cache(Generic[V]):
    """Values by key, up to `limit` by `size`; the least recently used go first.

    Of callers that want the same new value one makes it and the others wait.
    """

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self._limit, self._size = limit, size
        self._lock = threading.Lock()
        self._making: dict[Hashable, Future[V]] = {}
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._used = 0

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of `key`, made if it isn't there; an error of `make` reaches all who wait."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            waiting = self._making.get(key)
            if waiting is None:
                mine = self._making[key] = Future()
        if waiting is not None:
            return waiting.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, value)
        mine.set_result(value)
        return value

    def _keep(self, key: Hashable, value: V) -> None:
        size = self._size(value)
        if size > self._limit:
            return
        self._kept[key] = (value, size)
        self._used += size
        while self._used > self._limit:
            self._used -= self._kept.popitem(last=False)[1][1]


class Fresh(Generic[V]):
    """A value that is made again when it is older than `seconds`, by one caller at a time.

    The others get the value before, so that nobody waits for what somebody else reads. What takes
    long to make is made less often: half of the time goes by without it.
    """

    def __init__(self, make: Callable[[], V], seconds: float) -> None:
        self._make, self._seconds = make, seconds
        self._lock = threading.Lock()
        self._value: tuple[V, float] | None = None  # with the time until which it is fresh

    def get(self) -> V:
        held = self._value
        if held is not None and time.monotonic() < held[1]:
            return held[0]
        if not self._lock.acquire(blocking=held is None):
            assert held is not None
            return held[0]
        try:
            held = self._value
            began = time.monotonic()
            if held is None or began >= held[1]:
                value, now = self._make(), time.monotonic()
                held = self._value = (value, now + max(self._seconds, now - began))
            return held[0]
        finally:
            self._lock.release()

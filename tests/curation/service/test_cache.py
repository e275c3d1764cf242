"""One maker, bounded memory, values that age."""

import threading
import time

import pytest

from curation.service.cache import Cache, Fresh


def test_of_many_callers_one_makes_the_value() -> None:
    cache: Cache[int] = Cache(10, lambda _: 1)
    made, found = [], []

    def make() -> int:
        made.append(1)
        time.sleep(0.05)
        return 7

    threads = [threading.Thread(target=lambda: found.append(cache.get("k", make))) for _ in "12345"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [7] * 5
    assert made == [1]


def test_the_least_recently_used_go_first() -> None:
    cache: Cache[bytes] = Cache(30, len)
    for key in "abc":
        cache.get(key, lambda: b"x" * 10)
    cache.get("a", lambda: pytest.fail("it was there"))
    cache.get("d", lambda: b"y" * 10)
    made = []
    for key in "acdb":
        cache.get(key, lambda key=key: made.append(key) or b"x" * 10)  # type: ignore[misc]
    assert made == ["b"]
    cache.get("large", lambda: b"z" * 31)
    cache.get("d", lambda: pytest.fail("a value above the limit pushed it out"))


def test_an_error_is_not_kept() -> None:
    cache: Cache[int] = Cache(10, lambda _: 1)
    with pytest.raises(ZeroDivisionError):
        cache.get("k", lambda: 1 // 0)
    assert cache.get("k", lambda: 3) == 3


def test_nobody_waits_for_a_value_that_is_made_again() -> None:
    made = []
    go_on = threading.Event()

    def make() -> int:
        made.append(1)
        if len(made) > 1:
            assert go_on.wait(10)
        return len(made)

    fresh = Fresh(make, 0.02)
    assert fresh.get() == fresh.get() == 1
    time.sleep(0.03)
    other = threading.Thread(target=fresh.get)
    other.start()
    while len(made) < 2:
        time.sleep(0.001)
    assert fresh.get() == 1
    go_on.set()
    other.join()
    assert fresh.get() == 2

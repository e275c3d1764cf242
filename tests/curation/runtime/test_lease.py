"""Who may write a run on S3, over real HTTP."""

import time
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3_server import use

from curation.runtime import lease
from curation.runtime.lease import LOCK
from curation.runtime.s3 import S3Store
from curation.runtime.store import StoreError, hold


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    monkeypatch.setattr(lease, "LEASE_S", 2.0)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    use(monkeypatch, server.get_host_and_port()[1])
    boto3.Session().client("s3").create_bucket(Bucket="lvd")
    yield S3Store("s3://lvd/run")
    server.stop()


def test_one_writer_at_a_time(store: S3Store) -> None:
    with hold(store, ()):
        with (
            pytest.raises(StoreError, match=r"^s3://lvd/run: another process is writing this run"),
            hold(S3Store(store.uri), ()),
        ):
            pass
        assert store.exists(LOCK)
    assert not store.exists(LOCK)
    with hold(store, ()):
        pass


def test_the_lock_of_a_killed_writer_is_taken_over(store: S3Store) -> None:
    store.write(LOCK, b"{}")  # nobody renews it
    began = time.monotonic()
    with hold(store, ()):
        assert time.monotonic() - began > 1
        assert store.read(LOCK) != b"{}"


def test_a_writer_that_lost_its_lock_stops(store: S3Store) -> None:
    def work() -> None:
        with hold(store, ()):
            store.write(LOCK, b"of another")
            time.sleep(10)

    with pytest.raises(StoreError, match="another process writes this run since"):
        work()
    assert store.read(LOCK) == b"of another"


def test_a_condition_is_held_to(store: S3Store) -> None:
    first = store.write_if("x", b"1", "")
    assert first is not None
    assert store.write_if("x", b"2", "") is None
    assert store.write_if("x", b"1", "") == first  # its own, whose answer was lost
    second = store.write_if("x", b"3", first)
    assert second is not None
    assert store.write_if("x", b"4", first) is None
    assert store.read("x") == b"3"

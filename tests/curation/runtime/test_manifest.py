"""Markers: what counts as done, and what is kept when a stage starts over."""

from pathlib import Path

import pytest

from curation.runtime.manifest import (
    StageReport,
    begin,
    completed,
    fingerprint,
    finish,
    forget,
    read_report,
    restart,
)
from curation.runtime.store import FileStore, StoreError


def names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def done(tmp_path: Path) -> FileStore:
    """A finished stage with a file, and one in a folder that is addressed by content."""
    store = FileStore(str(tmp_path))
    begin(store, "embed", "old")
    store.write("embed/exact.parquet", b"1")
    store.write("embed/images/ab.parquet", b"2")
    finish(store, StageReport("embed", "old", {"images": 3}, 1.5))
    return store


def test_done_for_one_fingerprint_only(done: FileStore) -> None:
    assert completed(done, "embed", "old") == StageReport("embed", "old", {"images": 3}, 1.5)
    assert completed(done, "embed", "new") is None
    assert read_report(done, "dedup") is None


def test_the_same_fingerprint_keeps_every_file(done: FileStore, tmp_path: Path) -> None:
    before = names(tmp_path)
    begin(done, "embed", "old")
    assert names(tmp_path) == before
    forget(done, "embed")
    begin(done, "embed", "old")
    assert names(tmp_path) == before - {"embed/done.json"}


def test_another_fingerprint_keeps_what_is_addressed_by_content(
    done: FileStore, tmp_path: Path
) -> None:
    begin(done, "embed", "new", keep=("images",))
    assert names(tmp_path) == {"embed/started.json", "embed/images/ab.parquet"}
    restart(done, "embed")
    begin(done, "embed", "new")
    assert names(tmp_path) == {"embed/started.json"}


def test_no_marker_outlives_a_clearing_that_is_cut_short(
    done: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back at the old recipe, half the old files must not pass for all of them."""
    delete = FileStore.delete

    def cut_short(self: FileStore, path: str) -> None:
        if path == "embed/images/ab.parquet":
            raise KeyboardInterrupt
        delete(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(FileStore, "delete", cut_short)
        with pytest.raises(KeyboardInterrupt):
            begin(done, "embed", "new")
    begin(done, "embed", "old")
    assert [entry.path for entry in done.list("embed")] == ["embed/started.json"]


def test_a_marker_that_is_none(done: FileStore) -> None:
    for text in (b"{", b"[]", b'{"stage": 1, "other": 2}'):
        done.write("embed/done.json", text)
        with pytest.raises(StoreError, match=r"done\.json: not a stage marker"):
            read_report(done, "embed")


def test_fingerprints_tell_apart_what_differs() -> None:
    values = [(1,), ("1",), (1.0,), (None,), ([1],), ({"a": 1},), ({"a": 1, "b": 2},), (1, 1)]
    assert len({fingerprint(*value) for value in values}) == len(values)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})

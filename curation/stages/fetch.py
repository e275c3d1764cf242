"""URL lists -> tars of what was answered, and a members table a part with every URL's outcome.

A URL answers differently tomorrow, and later stages read an image's bytes again: so the bytes are
kept in the run. What was fetched once is never asked for again while the recipe still admits it.
"""

import asyncio
import io
import json
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any
from urllib.parse import urlsplit

from curation.images.decode import extension_of
from curation.images.sources import Member
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all
from curation.runtime.manifest import fingerprint
from curation.runtime.store import Store, StoreError, open_store, read_table, reason
from curation.stages.members import write_members
from curation.stages.url_lists import LANES, UrlList, UrlPart, read_lists
from curation.web.fetcher import Answer, DiskError, FetchConfig, Fetcher, Refused
from curation.web.hosts import is_within

FOLDER = "ingest/fetched"
ITEMS_PER_WORKER = 4
WAITING = 4096  # URLs of a worker under way, most of them waiting for their host's turn
BY_LATER_TRY = "retry"  # a table so named is complete, but what it lacks is to be tried again
# Faults that may go away by themselves: `curate retry` tries these URLs again.
NO_ANSWER = ("url_timeout", "url_unreachable", "url_no_such_host", "url_cut_short", "url_host_dead")
FAILED = ("url_408", "url_425", "url_429", "url_5", "url_robots_failed", "url_failed")
RETRYABLE = (*NO_ANSWER, *FAILED)


@dataclass(frozen=True)
class FetchPart:
    """A part of a list, the table its outcomes go to, and one of an earlier try if there is any."""

    urls: UrlPart
    table: str
    earlier: str | None


@dataclass(frozen=True)
class Budget:
    """How many URLs may fail: a broken network must not be taken for a dead web."""

    max_rejected_share: float
    min_images: int

    def check(self, urls: int, faults: Mapping[str, int]) -> None:
        """Raises StoreError when more have failed."""
        failed = sum(faults.values())
        if failed > self.min_images and failed > self.max_rejected_share * urls:
            raise StoreError(
                f"ingest: {failed} of {urls} URLs gave no image ({dict(faults)}), more than"
                f" failures.max_share = {self.max_rejected_share} allows; what was fetched is kept,"
                " `curate retry` tries the others"
            )


@dataclass(frozen=True)
class Fetching:
    """How lists are fetched, and how many URLs may fail."""

    how: FetchConfig
    budget: Budget

    @property
    def rules(self) -> tuple[object, ...]:
        """What decides on an image. How hard and how politely it is tried changes none."""
        how = self.how
        return how.robots, sorted(how.allow_networks), sorted(how.deny), how.max_bytes


def run(
    cfg: Fetching,
    lists: list[UrlList],
    part_images: int,
    store: Store,
    executor: Executor,
    events: Events,
) -> list[list[str]]:
    """The members tables of each list, one a part."""
    read = read_lists(lists, part_images, store, executor, events) if lists else []
    have = {entry.path for entry in store.list(FOLDER)}
    parts = [[_fetch_part(cfg.how, urls, have) for urls in of_list] for of_list in read]
    unique = {part.table: part for of_list in parts for part in of_list}
    items = _items(list(unique.values()), have, executor.workers)
    work = Work(
        "ingest",
        items,
        lambda item: item.payload is None,
        partial(FetchWorker, cfg.how, store.uri),
        check=lambda progress: cfg.budget.check(progress.total, progress.faults),
    )
    if lists:
        require_all(map_parts(work, executor, events), "ingest")
    _sweep(store, set(unique))
    return [[part.table for part in of_list] for of_list in parts]


def _fetch_part(cfg: FetchConfig, urls: UrlPart, have: set[str]) -> FetchPart:
    """What may be asked for names the part; what is taken of it, the table."""
    stem = f"{FOLDER}/{fingerprint(urls.digest, cfg.robots, cfg.allow_networks)[:24]}"
    table = f"{stem}-{fingerprint(sorted(cfg.deny), cfg.max_bytes)[:8]}.parquet"
    earlier = (path for path in have if path.startswith(stem) and path.endswith(".parquet"))
    return FetchPart(urls, table, next((path for path in sorted(earlier) if path != table), None))


def _items(parts: list[FetchPart], have: set[str], workers: int) -> list[Item]:
    """Unfinished parts in groups of whole lanes, which are fetched at the same time."""
    groups = min(LANES, ITEMS_PER_WORKER * workers)
    finished = sum(part.urls.rows for part in parts if part.table in have)
    items = [Item("urls", finished, None)]
    for number in range(groups):
        todo = [p for p in parts if p.urls.lane % groups == number and p.table not in have]
        if todo:
            items.append(Item(f"urls/{number:02d}", sum(p.urls.rows for p in todo), todo))
    return items


def _sweep(store: Store, tables: set[str]) -> None:
    """Removes what no list names any more, and what killed workers and earlier tries left."""
    files = {entry.path for entry in store.list(FOLDER)}
    stems = {_stem(table) for table in tables}
    tars = Counter(_stem(path) for path in files if path.endswith(".tar"))
    for path in files - tables:
        stem = _stem(path)
        if path.endswith(".tar") and stem in stems:
            used = next(table for table in tables if _stem(table) == stem)
            if tars[stem] == 1 or path == _tar_of(store, used):
                continue
        store.delete(path)


def _stem(path: str) -> str:
    return path.rpartition("-")[0]


def _tar_of(store: Store, table: str) -> str:
    return str(read_table(store, table, ["locator"])["locator"][0].as_py().decode())


def retryable(store: Store) -> list[str]:
    """The finished tables with URLs whose fault may have gone away."""
    found = []
    for entry in store.list(FOLDER):
        if entry.path.endswith(".parquet"):
            faults = read_table(store, entry.path, ["fault"])["fault"].drop_null().to_pylist()
            if any(fault.startswith(RETRYABLE) for fault in faults):
                found.append(entry.path)
    return found


def try_again(store: Store, table: str) -> None:
    """Makes a part unfinished; what it has of images stays."""
    later = f"{_stem(table)}-{BY_LATER_TRY}.parquet"
    if table != later:
        store.write(later, store.read(table))
        store.delete(table)


@dataclass
class _Outcome:
    """One URL: why there is no image, or where its bytes lie in the part's spool."""

    url: str
    fault: str | None = None
    offset: int = 0
    size: int = 0
    sha256: str = ""
    ext: str = ""
    about: bytes = b""


@dataclass
class _Open:
    """A part that is being fetched."""

    part: FetchPart
    spool: IO[bytes]
    outcomes: list[_Outcome | None]
    waiting: int
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)  # url -> row of an earlier try
    archive: IO[bytes] | None = None


class FetchWorker:
    """Fetches parts of a list, many URLs at a time; each part is published when it is complete."""

    def __init__(self, cfg: FetchConfig, run_uri: str) -> None:
        self._cfg, self._store = cfg, open_store(run_uri)

    def __call__(self, parts: list[FetchPart]) -> Counts:
        faults: Counter[str] = Counter()
        try:
            asyncio.run(self._fetch_all(parts, faults))
        except BaseExceptionGroup as group:  # the first is the cause, the others were cancelled
            raise group.exceptions[0] from None
        return {"faults": dict(faults)}

    async def _fetch_all(self, parts: list[FetchPart], faults: Counter[str]) -> None:
        window = asyncio.Semaphore(WAITING)
        async with Fetcher(self._cfg) as fetcher, asyncio.TaskGroup() as group:
            for part in parts:
                if self._store.exists(part.table):
                    continue  # of a worker that died
                table = read_table(self._store, part.urls.table, row_group=part.urls.row_group)
                opened = self._open(part, len(table))
                for number, row in enumerate(table.to_pylist()):
                    await window.acquire()
                    task = group.create_task(self._one(fetcher, opened, number, row, faults))
                    task.add_done_callback(lambda _: window.release())

    async def _one(
        self,
        fetcher: Fetcher,
        opened: _Open,
        number: int,
        row: dict[str, str],
        faults: Counter[str],
    ) -> None:
        """One URL of a part; the last one publishes it."""
        outcome = self._again(opened, row["url"])
        if outcome is None:
            try:
                answer = await fetcher.fetch(row["url"])
                outcome = self._taken(opened, row, answer)
            except Refused as refused:
                outcome = _Outcome(row["url"], str(refused))
            except DiskError as error:
                raise reason(tempfile.gettempdir(), error) from None
        if outcome.fault:
            faults[outcome.fault.split()[0]] += 1
        opened.outcomes[number] = outcome
        opened.waiting -= 1
        if not opened.waiting:
            # In a thread: answers go on coming while a tar is written and synced.
            await asyncio.to_thread(self._publish, opened)

    def _open(self, part: FetchPart, rows: int) -> _Open:
        spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the part is published)
        opened = _Open(part, spool, [None] * rows, rows)
        if part.earlier is not None:
            table = read_table(self._store, part.earlier)
            good = [row for row in table.to_pylist() if row["fault"] is None]
            opened.kept = {row["key"]: row for row in good}
            if good:
                opened.archive = self._store.open(good[0]["locator"].decode())
        return opened

    def _again(self, opened: _Open, url: str) -> _Outcome | None:
        """What an earlier try has fetched, if the recipe still admits it."""
        row = opened.kept.get(url)
        if row is None or opened.archive is None or row["size"] > self._cfg.max_bytes:
            return None
        (extra,) = row["extras"]
        about = _read(opened.archive, extra["offset"], extra["size"])
        story = json.loads(about)
        hosts = [urlsplit(story[name]).hostname or "" for name in ("url", "answered_by")]
        if any(is_within(host, self._cfg.deny) for host in hosts):
            return None
        data = _read(opened.archive, row["offset"], row["size"])
        offset = _spooled(opened.spool, io.BytesIO(data))
        ext = extension_of(data) or ""
        return _Outcome(url, None, offset, row["size"], row["version"], ext, about)

    def _taken(self, opened: _Open, row: dict[str, str], answer: Answer) -> _Outcome:
        """An answer's bytes, put into the part's spool if they begin like an image."""
        with answer.body as body:
            ext = extension_of(body.read(16))
            if ext is None:
                return _Outcome(row["url"], "url_not_an_image it doesn't begin like one")
            body.seek(0)
            offset = _spooled(opened.spool, body)
        story = {
            "url": row["url"],
            "answered_by": answer.url,
            "columns": json.loads(row["columns"]),
        }
        about = json.dumps(story, ensure_ascii=False, sort_keys=True).encode()
        return _Outcome(row["url"], None, offset, answer.size, answer.sha256, ext, about)

    def _publish(self, opened: _Open) -> None:
        """The tar in the order of the list, then the table."""
        outcomes = [outcome for outcome in opened.outcomes if outcome is not None]
        identity = [(o.fault is None, o.sha256, o.about.decode()) for o in outcomes]
        tar_path = f"{_stem(opened.part.table)}-{fingerprint(identity)[:24]}.tar"
        members: list[Member] = []
        with (
            opened.spool,
            self._store.publish(tar_path) as scratch,
            tarfile.open(scratch, "w", format=tarfile.GNU_FORMAT) as tar,
        ):
            for number, outcome in enumerate(outcomes):
                members.append(_add(tar, number, outcome, opened.spool))
        rows = [
            (outcome.url, tar_path, member, outcome.sha256)
            for outcome, member in zip(outcomes, members, strict=True)
        ]
        write_members(self._store, opened.part.table, rows, len(rows))
        if opened.archive is not None:
            opened.archive.close()


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _spooled(spool: IO[bytes], body: IO[bytes]) -> int:
    """Puts bytes at the end of a spool; returns where they begin."""
    offset = spool.seek(0, io.SEEK_END)
    try:
        shutil.copyfileobj(body, spool)
    except OSError as error:
        raise reason(tempfile.gettempdir(), error) from None
    return offset


def _add(tar: tarfile.TarFile, number: int, outcome: _Outcome, spool: IO[bytes]) -> Member:
    """Adds an image and its story, and says where they lie."""
    if outcome.fault is not None:
        return Member(outcome.url, 0, 0, fault=outcome.fault)
    spool.seek(outcome.offset)
    offset = _append(tar, f"{number:06d}.{outcome.ext}", spool, outcome.size)
    place = _append(tar, f"{number:06d}.json", io.BytesIO(outcome.about), len(outcome.about))
    extra: dict[str, str | int] = {"ext": "json", "offset": place, "size": len(outcome.about)}
    return Member(outcome.url, offset, outcome.size, [extra])


def _append(tar: tarfile.TarFile, name: str, data: IO[bytes], size: int) -> int:
    info = tarfile.TarInfo(name)
    info.size = size
    tar.addfile(info, data)
    return int(tar.offset) - -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

"""Lists of URLs as sources, against servers on loopback that count what they are asked."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished import final_files
from loopback import Site, answer, dropped, flood, silent, trickle
from workbench import Project, picture

from curation.cli import main
from curation.runtime.store import FileStore
from curation.stages import url_lists
from curation.web import fetcher

SECTION = {
    "allow_networks": ["127.0.0.0/29"],
    "host_connections": 8,
    "host_delay_s": 0,
    "timeout_s": 1,
    "retries": 1,
}
TAKE_ALL = ["as_is", {"sample": {"k": 100}}]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "BACKOFF_S", 0.01)


def jpeg(seed: int) -> bytes:
    data = io.BytesIO()
    picture(seed).save(data, "JPEG")
    return data.getvalue()


def album(seeds: Iterable[int]) -> dict[str, Any]:
    return {f"/{seed}.jpg": answer(jpeg(seed)) for seed in seeds}


def from_list(project: Callable[..., Project], urls: Iterable[str], **sections: Any) -> Project:
    """A project whose pool is a text list of URLs."""
    work = project(pool=[], fetch=SECTION, **sections)
    work.recipe["sources"]["curated"]["wanted"]["retrieve"] = TAKE_ALL
    (work.folder / "list.txt").write_text("# a list\n\n" + "\n".join(urls) + "\n")
    work.recipe["sources"]["pool"] = [{"uri": str(work.folder / "list.txt"), "format": "urls"}]
    return work


def pool_rows(work: Project) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in work.lineage() if row["source"] == "pool"}


def reasons(work: Project) -> dict[str, str]:
    """The first word of each pool image's reason, by its URL."""
    return {key: row["reason"].split()[0] for key, row in pool_rows(work).items()}


BAD: dict[str, tuple[Any, str]] = {
    "/missing": (None, "url_404"),
    "/page": (answer(b"<html>", kind="text/html"), "url_not_an_image"),
    "/said-jpeg": (answer(b"<html> but called a JPEG"), "url_not_an_image"),
    "/avif": (answer(b"\0\0\0\x1cftypavif" + b"x" * 99), "url_not_an_image"),
    "/half": (answer(jpeg(1)[:900]), "truncated"),
    "/flood": (flood, "url_too_large"),
    "/trickle": (trickle, "url_timeout"),
    "/silent": (silent, "url_timeout"),
    "/dropped": (dropped, "url_cut_short"),
    "/tired": (answer(status="503 Later"), "url_503"),
    "/inside": (answer(status="302 Found", Location="http://10.0.0.1/x"), "url_private_address"),
    "/private": (answer(jpeg(2)), "url_robots"),
    "/noai": (answer(jpeg(3), X_Robots_Tag="noai"), "url_noindex"),
}


def test_every_url_has_an_outcome_and_good_images_go_all_the_way(
    project: Callable[..., Project],
) -> None:
    pages = album(range(20)) | {path: page for path, (page, _) in BAD.items() if page}
    pages["/robots.txt"] = answer(b"User-agent: *\nDisallow: /private")
    pages["/moved"] = answer(status="301 Moved", Location="/5.jpg")
    with Site(pages) as site, Site(album([50]), host="127.0.0.9") as inside:
        urls = [site.url(path) for path in (*album(range(20)), *BAD, "/moved")]
        wrong = [inside.url("/50.jpg"), "nonsense", "http://no-such-host.invalid/x"]
        wrong.append("http://images.evil.example/x")
        work = from_list(project, urls + wrong, images={"max_bytes": 100_000})
        work.recipe["fetch"] = {**SECTION, "deny": ["evil.example"]}
        assert work.run() == 0
        assert site.asked["/private"] == 0
        assert site.asked["/robots.txt"] == 1
        assert inside.connections == 0
        found = reasons(work)
    for path, (_, reason) in BAD.items():
        assert found[site.url(path)] == reason
    told = [found[url] for url in wrong]
    assert told == ["url_private_address", "url_invalid", "url_no_such_host", "url_denied"]
    rows = pool_rows(work)
    assert len(rows) == len(urls + wrong)
    good = {site.url(path): jpeg(int(path[1:-4])) for path in album(range(20))}
    for url, data in good.items():
        row = rows[url]
        assert row["decision"] == "selected" or url.endswith("/5.jpg")
        assert (row["id"], row["uri"]) == (hashlib.sha256(data).hexdigest(), url)
    assert found[site.url("/moved")].startswith(("duplicate_of", "selected_by"))
    stories = {}
    for shard in sorted((work.run_folder / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                if ext == "jpg":
                    assert hashlib.sha256(data).hexdigest() == key
                elif ext == "source.json":
                    stories[key] = json.loads(data)
    assert {story["url"] for story in stories.values()} >= set(good) - {site.url("/5.jpg")}


def write_list(path: Path, urls: list[str]) -> None:
    captions = [f"caption {url[-6:]}, with a comma" for url in urls]
    if path.suffix == ".txt":
        path.write_text("\ufeff" + "\r\n".join(urls))
    elif path.suffix == ".parquet":
        table = {"TEXT": captions, "URL": urls, "n": list(range(len(urls)))}
        pq.write_table(pa.table(table), path, row_group_size=5)
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        rows = [f'{u}{mark}"{c}"' for u, c in zip(urls, captions, strict=True)]
        path.write_text("\n".join([f"url{mark}caption", *rows]))


@pytest.mark.parametrize("form", ["txt", "csv", "tsv", "parquet", "folder"])
def test_each_form_of_list_gives_the_same_images(
    project: Callable[..., Project], form: str
) -> None:
    with Site(album(range(12))) as site:
        work = from_list(project, [])
        given = work.folder / "lists"
        given.mkdir()
        urls = [site.url(path) for path in album(range(12))]
        if form == "folder":
            write_list(given / "a.csv", urls[:5])
            write_list(given / "b.parquet", urls[5:])
            (given / "readme.md").write_text("no list")
        else:
            write_list(given / f"list.{form}", urls)
        uri = given if form == "folder" else given / f"list.{form}"
        work.recipe["sources"]["pool"] = [{"uri": str(uri), "format": "urls"}]
        assert work.run() == 0
    rows = pool_rows(work)
    assert list(rows) == urls
    ids = [hashlib.sha256(jpeg(seed)).hexdigest() for seed in range(12)]
    assert [row["id"] for row in rows.values()] == ids
    if form != "txt":
        (tar,) = list((work.run_folder / "shards").glob("000000.tar"))
        with tarfile.open(tar) as shard:
            texts = [m for m in shard if m.name.endswith("source.json")]
            columns = json.loads(shard.extractfile(texts[0]).read())["columns"]  # type: ignore[union-attr]
        assert any("with a comma" in str(value) for value in columns.values())


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.csv", b"picture,text\na,b\n", "no column of URLs; name it one of url, image_url"),
        ("x.csv", b"", "no column of URLs"),
        ("x.txt", b"# nothing\n\n", "a list without URLs"),
        ("x.txt", b"\xff\xd8\xff\0\0binary\n", "line 1 is no text"),
        ("x.parquet", b"PAR1 no", "not a sound Parquet file"),
        ("x.jpg", b"", "no lists of URLs (.txt, .csv, .tsv"),
    ],
)
def test_what_is_no_list_is_one_clear_line(
    project: Callable[..., Project],
    capsys: pytest.CaptureFixture[str],
    name: str,
    data: bytes,
    said: str,
) -> None:
    work = from_list(project, [])
    (work.folder / name).write_bytes(data)
    work.recipe["sources"]["pool"] = [{"uri": str(work.folder / name), "format": "urls"}]
    assert work.run() == 1
    text = capsys.readouterr().err
    assert said in text
    assert name in text
    assert "Traceback" not in text


def test_a_list_without_its_format_gets_advice(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    work = from_list(project, ["http://x/y"])
    del work.recipe["sources"]["pool"][0]["format"]
    assert work.run() == 1
    assert "sources.pool.0.uri" in (text := capsys.readouterr().err)
    assert "for a list of URLs say format: urls" in text


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("deny", ["http://x.com/"], "must be a domain such as example.com"),
        ("allow_networks", ["10.1.2.3/8"], "must be a network such as 10.1.0.0/16"),
        ("user_agent", "(me)", "must be like lvd/0.1"),
        ("robots", "maybe", "must be 'respect' or 'ignore'"),
    ],
)
def test_a_wrong_setting_is_told(
    project: Callable[..., Project],
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: object,
    said: str,
) -> None:
    work = from_list(project, ["http://x/y"])
    work.recipe["fetch"] = {field: value}
    assert work.run() == 2
    text = capsys.readouterr().err
    assert f"fetch.{field}" in text
    assert said in text


def copies_of_killed_runs(
    work: Project, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], None]]:
    """What SIGKILL would have left at each write of the fetching: puts it in place, one by one."""
    publish, one_at_a_time = FileStore.publish, threading.Lock()
    copies = work.folder / "copies"

    @contextlib.contextmanager
    def copying(self: FileStore, path: str) -> Iterator[Path]:
        with one_at_a_time:
            with publish(self, path) as scratch:
                yield scratch
                copy(path)
            copy(path)

    def copy(path: str) -> None:
        if path.startswith("ingest/"):
            number = len(list(copies.iterdir())) if copies.exists() else 0
            shutil.copytree(work.run_folder, copies / f"{number:03d}")

    monkeypatch.setattr(FileStore, "publish", copying)
    assert work.run("--ray", "off", "--until", "ingest") == 0
    monkeypatch.setattr(FileStore, "publish", publish)
    for folder in sorted(copies.iterdir()):

        def place(folder: Path = folder) -> None:
            shutil.rmtree(work.run_folder)
            folder.rename(work.run_folder)

        yield place


@pytest.mark.slow
def test_a_killed_run_asks_for_no_finished_part_again(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site(album(range(40))) as site:
        urls = [site.url(path) for path in album(range(40))]
        work = from_list(project, [*urls, site.url("/missing")])
        deaths = copies_of_killed_runs(work, monkeypatch)
        saved = Counter[int]()
        whole: dict[str, Any] | None = None
        for place in deaths:
            if whole is None:
                whole = final_files(work.run_folder)
            place()
            folder = work.run_folder / "ingest" / "fetched"
            finished = [pq.read_table(f)["key"].to_pylist() for f in folder.glob("*.parquet")]
            keys = {key for part in finished for key in part}
            site.asked.clear()
            assert work.run("--ray", "off", "--until", "ingest") == 0
            assert not any(site.asked["/" + key.rpartition("/")[2]] for key in keys)
            assert all(site.asked["/" + key.rpartition("/")[2]] == 1 for key in set(urls) - keys)
            assert final_files(work.run_folder) == whole
            saved[len(keys)] += 1
    assert {0, 41} < set(saved)


def test_retry_asks_only_for_what_failed(project: Callable[..., Project]) -> None:
    pages = album(range(20)) | {"/later.jpg": answer(status="503 Later"), "/never.jpg": silent}
    with Site(pages) as site:
        work = from_list(project, [site.url(path) for path in (*pages, "/gone")])
        assert work.run() == 0
        assert reasons(work)[site.url("/later.jpg")] == "url_503"
        assert site.asked["/later.jpg"] == 2
        site.pages |= {"/later.jpg": answer(jpeg(70)), "/3.jpg": answer(status="404 Gone")}
        site.asked.clear()
        assert main(["retry", str(work.run_folder), "--ray", "off"]) == 0
        assert not any(site.asked[path] for path in album(range(20)))
        assert (site.asked["/later.jpg"], site.asked["/never.jpg"]) == (1, 2)
        rows = pool_rows(work)
        assert rows[site.url("/later.jpg")]["id"] == hashlib.sha256(jpeg(70)).hexdigest()
        assert rows[site.url("/3.jpg")]["decision"] == "selected"
        assert reasons(work)[site.url("/never.jpg")] == "url_timeout"
        tars = list((work.run_folder / "ingest" / "fetched").glob("*.tar"))
        assert len(tars) == len(list((work.run_folder / "ingest" / "fetched").glob("*.parquet")))


def test_a_changed_recipe_keeps_what_it_still_admits(project: Callable[..., Project]) -> None:
    with Site(album(range(10))) as one, Site(album(range(20, 30)), host="127.0.0.2") as two:
        urls = [one.url(p) for p in one.pages] + [two.url(p) for p in two.pages]
        work = from_list(project, urls)
        assert work.run() == 0
        one.asked.clear()
        two.asked.clear()
        work.recipe["fetch"] = {**SECTION, "timeout_s": 2}
        assert work.run() == 0
        work.recipe["fetch"] = {**SECTION, "deny": ["127.0.0.2"]}
        assert work.run() == 0
        assert not one.asked
        assert not two.asked
        found = reasons(work)
        assert {found[url] for url in urls[10:]} == {"url_denied"}
        assert all(found[url].startswith("selected") for url in urls[:10])
        with (work.folder / "list.txt").open("a") as file:
            file.write(one.url("/missing") + "\n")
        os.utime(work.folder / "list.txt")
        assert work.run() == 0
        assert sum(one.asked.values()) <= 10  # of the part that grew


def test_two_runs_of_the_same_answers_give_the_same_files(project: Callable[..., Project]) -> None:
    with Site(album(range(30))) as site:
        work = from_list(project, [site.url(path) for path in (*site.pages, "/missing")])
        assert work.run() == 0
        first = final_files(work.run_folder)
        shutil.rmtree(work.run_folder)
        assert work.run() == 0
        assert final_files(work.run_folder) == first


def test_a_broken_network_stops_the_run(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [f"http://127.0.0.1:9/{number}" for number in range(60)]
    failures = {"max_share": 0.3, "min_images": 10}
    work = from_list(project, urls, failures=failures)
    assert work.run() == 1
    text = capsys.readouterr().err
    assert "60 of 60 URLs gave no image" in text
    assert "`curate retry`" in text


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_limits_of_a_host_hold_over_all_workers(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(url_lists, "ONE_LANE_BYTES", 0)
    with contextlib.ExitStack() as stack:
        sites = [
            stack.enter_context(Site(album(range(n * 20, n * 20 + 20)), host=f"127.0.0.{n + 1}"))
            for n in range(6)
        ]
        urls = [site.url(path) for site in sites for path in site.pages]
        work = from_list(project, urls[::2] + urls[1::2])
        work.recipe["fetch"] = {**SECTION, "host_connections": 1, "host_delay_s": 0.05}
        assert work.run("--ray", "local") == 0
        for site in sites:
            assert site.most_open == 1
            assert site.asked["/robots.txt"] == 1
            assert max(site.began) - min(site.began) > 0.9 * 0.05 * 20  # 21 requests
    assert "rejected" not in {row["decision"] for row in pool_rows(work).values()}

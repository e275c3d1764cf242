"""Shards that the real `curate` wrote, plain tars and folders: the original bytes, or one line."""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from moto.server import ThreadedMotoServer
from workbench import Models, Project, picture, write_pictures

import pretrain.shards
from pretrain.crops import CropConfig
from pretrain.errors import UserError
from pretrain.samples import Source
from pretrain.shards import open_source
from pretrain.storage import LocalStorage
from pretrain.stream import Loader, StreamConfig

TAKE_ALL = {"retrieve": ["as_is", {"sample": {"k": 100}}]}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def read_all(source: Source) -> dict[str, bytes]:
    samples = [source.read(number) for number in range(int(source.counts.sum()))]
    found = {sample.key: sample.data for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_pictures(folder, range(17))
    write_pictures(folder, range(17, 22), ".png")
    return folder


@pytest.fixture(scope="module")
def curated(
    tmp_path_factory: pytest.TempPathFactory, originals: Path, models: Models
) -> tuple[Path, Path]:
    """(the run's folder, the folder of originals): pictures with captions and masks beside them."""
    folder = tmp_path_factory.mktemp("curated")
    with tarfile.open(folder / "pool.tar", "w") as tar:
        for path in sorted(originals.iterdir()):
            add(tar, path.name, path.read_bytes())
            add(tar, f"{path.stem}.json", b'{"a": 1}')
            add(tar, f"{path.stem}.mask.png", b"not the image of the sample")
    write_pictures(folder / "wanted", [100])
    recipe = {
        "name": "test",
        "output": str(folder / "run"),
        "sources": {
            "pool": [{"uri": str(folder / "pool.tar")}],
            "curated": {"wanted": {"uri": str(folder / "wanted"), **TAKE_ALL}},
        },
        "encoder": {"model": "test_vit", "weights": str(models.encoder)},
        "copy_descriptor": {"weights": str(models.descriptor)},
        "dedup": {"min_cosine": 0.9999, "holdout_min_cosine": 0.9999},
        "cluster": {"k": 2},
        "shards": {"images_per_shard": 5},
    }
    project = Project(folder, recipe)
    assert project.run() == 0
    shutil.copy(folder / "wanted" / "00100.jpg", originals)
    return project.run_folder, originals


@pytest.fixture
def shards(curated: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the shards, to be damaged."""
    return Path(shutil.copytree(curated[0] / "shards", tmp_path / "shards"))


def test_every_image_that_curate_selected_is_read_with_its_own_bytes(
    curated: tuple[Path, Path],
) -> None:
    run, originals = curated
    source = open_source(str(run / "shards"))
    wanted = {hashlib.sha256(d).hexdigest(): d for d in map(Path.read_bytes, originals.iterdir())}
    assert source.counts.tolist() == [5, 5, 5, 5, 3]
    assert read_all(source) == wanted
    manifest = json.loads((run / "shards" / "manifest.json").read_text())
    assert source.fingerprint == manifest["hash"][:16]


@pytest.fixture
def in_s3(curated: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in a bucket, behind a real HTTP server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket="lvd")
    for path in (curated[0] / "shards").iterdir():
        if path.is_file():
            client.upload_file(str(path), "lvd", f"run/shards/{path.name}")
    yield "s3://lvd/run/shards"
    server.stop()


def test_shards_in_s3_give_the_same_batches(curated: tuple[Path, Path], in_s3: str) -> None:
    here, there = open_source(str(curated[0] / "shards")), open_source(in_s3)
    assert read_all(there) == read_all(here)
    assert there.fingerprint == here.fingerprint
    crops = CropConfig(global_size=32, local_size=14, local_crops=2)
    for workers in (0, 2):
        cfg = StreamConfig(batch=5, workers=workers)
        both = zip(Loader(here, crops, cfg), Loader(there, crops, cfg), strict=False)
        for expected, found in islice(both, 6):
            assert found.keys == expected.keys
            assert torch.equal(found.global_crops, expected.global_crops)
            assert torch.equal(found.local_crops, expected.local_crops)


def test_opening_reads_no_shard_and_no_index(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("an index was read")

    monkeypatch.setattr(pq, "read_table", refuse)
    assert len(open_source(str(shards)).counts) == 5


def test_many_threads_read_as_one_does_with_few_indexes_in_memory(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.random.default_rng(0).integers(0, 23, 400).tolist()
    one = open_source(str(shards))
    expected = [one.read(number) for number in numbers]
    monkeypatch.setattr(pretrain.shards, "CACHED_ROWS", 7)
    many = open_source(str(shards))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(many.read, numbers)) == expected
    assert len(many._cached) == 1  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(many)).read(3) == one.read(3)


def test_other_ranks_need_not_list_the_files(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_source(str(shards)).read(7)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "files", None)
        assert open_source(str(shards), check=False).read(7) == expected
    (shards / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a manifest"):
        open_source(str(shards), check=False)
    (shards / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"shards without manifest.json"):
        open_source(str(shards), check=False)


def damage(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def edit_manifest(folder: Path, **fields: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def empty_first(shards: Path) -> None:
    rows = json.loads((shards / "manifest.json").read_text())["shards"]
    rows[0]["images"] = 0
    edit_manifest(shards, shards=rows)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def lone_tar(shards: Path) -> None:
    shutil.copy(shards / "000000.tar", shards / "000077.tar")


OPENING: dict[str, tuple[Callable[[Path], object], str]] = {
    "tar missing": (lambda s: (s / "000002.tar").unlink(), r"000002.tar: missing, though manif"),
    "index missing": (
        lambda s: (s / "000002.index.parquet").unlink(),
        r"000002.index.parquet: missing",
    ),
    "truncated": (lambda s: truncate(s / "000003.tar"), r"000003.tar: truncated: \d+ bytes, mani"),
    "other size": (lambda s: damage(s / "000003.tar", 10**6, b"x"), "not the file that was listed"),
    "no manifest": (lambda s: (s / "manifest.json").unlink(), "shards without manifest.json"),
    "not JSON": (lambda s: (s / "manifest.json").write_text("{"), "not a manifest as `curate`"),
    "other JSON": (lambda s: (s / "manifest.json").write_text("[1]"), "not a manifest as `cur"),
    "hash": (lambda s: edit_manifest(s, hash="0" * 64), "its `hash` is not that of its shards"),
    "no shards": (
        lambda s: edit_manifest(s, shards=[], hash=hashlib.sha256(b"").hexdigest()),
        "lists no shards",
    ),
    "empty": (empty_first, "000000.tar: an empty shard"),
    "another's": (lone_tar, r"000077.tar: not in manifest.json; keep shards of other runs apart"),
}


@pytest.mark.parametrize("fault", OPENING)
def test_what_is_wrong_is_said_on_opening(shards: Path, fault: str) -> None:
    change, text = OPENING[fault]
    change(shards)
    with pytest.raises(UserError, match=text) as raised:
        open_source(str(shards))
    assert "\n" not in str(raised.value)
    assert str(shards) in str(raised.value)


def other_index(shards: Path) -> None:
    shutil.copy(shards / "000001.index.parquet", shards / "000000.index.parquet")


def shifted_index(shards: Path) -> None:
    path = shards / "000000.index.parquet"
    table = pq.read_table(path)
    shifted = pa.array(table["offset"].to_numpy() + 512)
    pq.write_table(table.set_column(2, "offset", shifted), path)


def other_names(shards: Path) -> None:
    path = shards / "000000.index.parquet"
    table = pq.read_table(path)
    names = pa.array([f"0{name[1:]}" for name in table["member"].to_pylist()])
    pq.write_table(table.set_column(1, "member", names), path)


def headless(shards: Path) -> None:
    offsets = pq.read_table(shards / "000000.index.parquet")["offset"].to_pylist()
    for offset in offsets:
        damage(shards / "000000.tar", offset - 512, b"\0" * 512)


READING: dict[str, tuple[Callable[[Path], object], str]] = {
    "unreadable": (
        lambda s: (s / "000000.index.parquet").write_bytes(b"PAR1 but no more"),
        r"000000.index.parquet: can't be read \(.*\); copy it again",
    ),
    "another's": (other_index, r"index.parquet: not the index of this 000000.tar \(manifest.json"),
    "shifted": (shifted_index, r"000000.tar: its index doesn't match it at byte \d+"),
    "other names": (other_names, r"000000.tar: its index doesn't match it at byte \d+"),
    "headless": (headless, r"000000.tar: its index doesn't match it at byte \d+"),
}


@pytest.mark.parametrize("fault", READING)
def test_an_index_that_does_not_match_is_found_when_it_is_used(shards: Path, fault: str) -> None:
    change, text = READING[fault]
    change(shards)
    source = open_source(str(shards))
    with pytest.raises(UserError, match=text) as raised:
        read_all(source)
    assert "\n" not in str(raised.value)


def test_a_shard_that_shrinks_under_way_is_named(shards: Path) -> None:
    source = open_source(str(shards))
    for path in shards.glob("*.tar"):
        path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"00000\d.tar: truncated since it was opened"):
        read_all(source)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_plain_tars_are_scanned(tmp_path: Path, originals: Path, form: int) -> None:
    paths = sorted(originals.iterdir())
    for number in range(2):
        with tarfile.open(tmp_path / f"x-{number}.tar", "w", format=form) as tar:
            for path in paths[number::2]:
                add(tar, f"deep/{path.name}", path.read_bytes())
                add(tar, f"deep/{path.stem}.cls", b"7")
    told: list[str] = []
    source = open_source(str(tmp_path), told.append)
    assert source.counts.tolist() == [len(paths[0::2]), len(paths[1::2])]
    assert read_all(source) == {f"deep/{p.stem}": p.read_bytes() for p in paths}
    assert len(told) == 1
    assert "no index; reading the headers of 2 tars" in told[0]
    assert pickle.loads(pickle.dumps(source)).read(5) == source.read(5)
    with tarfile.open(tmp_path / "x-1.tar", "a") as tar:
        add(tar, "one-more.jpg", b"")
    assert open_source(str(tmp_path), told.append).fingerprint != source.fingerprint


def test_faults_of_plain_tars_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "x.txt", b"no image")
    with pytest.raises(UserError, match=r"a.tar: an empty shard: it holds no image"):
        open_source(str(tmp_path), print)
    with tarfile.open(path, "w") as tar:
        add(tar, "x.jpg", b"1" * 5000)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"a.tar: it ends at byte 3000, inside a member"):
        open_source(str(tmp_path), print)
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "x.jpg", b"1" * 5000)
    with pytest.raises(UserError, match=r"a.tar: it is packed with gzip; unpack it"):
        open_source(str(tmp_path), print)
    path.rename(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match=r"only packed tars \(a.tar.gz\); unpack them"):
        open_source(str(tmp_path), print)


def test_a_folder_of_images_is_read_at_any_depth(tmp_path: Path) -> None:
    wanted = {}
    for number in range(30):
        name = f"{number % 3}/ünï {number}.JPG"
        place = tmp_path / "pictures" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 16, 16).save(place, "JPEG")
        wanted[name] = place.read_bytes()
    (tmp_path / "pictures" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "pictures" / "notes.txt").write_bytes(b"")
    (tmp_path / "pictures" / "2" / "loop").symlink_to(tmp_path / "pictures")
    source = open_source(str(tmp_path / "pictures"))
    found = read_all(source)
    assert list(found) == sorted(found, key=str.encode)
    assert found == wanted


def test_a_large_folder_is_cut_in_shards(tmp_path: Path) -> None:
    for number in range(2005):
        (tmp_path / f"{number}.jpg").touch()
    assert open_source(str(tmp_path)).counts.tolist() == [1000, 1000, 5]


def test_where_there_is_nothing_to_read(tmp_path: Path, curated: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"none: no such folder; name the folder"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"nothing to read; wanted shards \(\*.tar\) or images"):
        open_source(str(tmp_path))
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match=r"x: a file, not a folder"):
        open_source(str(tmp_path / "x"))
    with pytest.raises(UserError, match=r"can't read gs://; use a local path or s3://"):
        open_source("gs://bucket/x")
    with pytest.raises(UserError, match=r"a whole run; name its shards: .*/run/shards$"):
        open_source(str(curated[0]))

"""The safety filter by each kind of model file, and blurred faces, on real photographs."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import timm
import torch
from finished import counts
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file
from workbench import Project, picture

skimage = pytest.importorskip("skimage")
TAKE_ALL = ["as_is", {"sample": {"k": 100}}]
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "clock", "brick", "moon")
SIDE = 64


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def photographs(project: Callable[..., Project], **safety: Any) -> Project:
    work = project(pool=[], safety=safety)
    work.recipe["sources"]["curated"]["wanted"]["retrieve"] = TAKE_ALL
    picture(300).point(lambda value: value // 6).save(work.folder / "curated" / "dark.jpg")
    for name in PHOTOGRAPHS:
        image = photograph(name)
        form = "png" if name == "coffee" else "jpg"
        image.save(work.folder / "pool" / f"{name}.{form}", quality=92)
    return work


class Brightness(torch.nn.Module):
    """Logits of (dark, bright), by the mean of the normalised pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=[1, 2, 3])
        return torch.stack([-20 * mean, 20 * mean], dim=1)


def as_torchscript(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "filter.torchscript.pt"
    torch.jit.script(Brightness()).save(str(path))
    return path, {}


def as_onnx(folder: Path, batch: int | str = "batch") -> tuple[Path, dict[str, Any]]:
    """The same as a graph: the mean, times -20 and 20."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["column"]),
        helper.make_node("Mul", ["column", "weights"], ["logits"]),
    ]
    arrays = {"axes": np.array([1, 2, 3]), "last": np.array([1])}
    arrays["weights"] = np.array([[-20.0, 20.0]], np.float32)
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 2])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    return _saved(graph, folder / "filter.onnx"), {}


def as_onnx_of_one(folder: Path) -> tuple[Path, dict[str, Any]]:
    return as_onnx(folder, batch=1)


def _saved(graph: Any, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def as_timm(folder: Path) -> tuple[Path, dict[str, Any]]:
    torch.manual_seed(3)
    net = timm.create_model("test_vit", num_classes=2)
    path = folder / "filter.safetensors"
    save_file(net.state_dict(), path)
    return path, {"model": "test_vit", "size": 160}


ROUTES = [as_torchscript, as_onnx, as_onnx_of_one, as_timm]


def expected(path: Path, given: dict[str, Any], work: Project) -> dict[str, float]:
    """Scores by the model itself, on images prepared without LVD."""
    size = given.get("size", SIDE)
    net: Any = Brightness()
    if "model" in given:
        from safetensors.torch import load_file

        net = timm.create_model("test_vit", num_classes=2)
        net.load_state_dict(load_file(path))
        net.eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    found = {}
    for file in sorted((work.folder / "pool").iterdir()):
        image = Image.open(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        pixels = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)[None]
        with torch.inference_mode():
            logits = net(torch.from_numpy(pixels.astype(np.float32)))
        found[file.name] = float(logits.softmax(dim=1)[0, 1])
    return found


def pool_rows(work: Project) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in work.lineage() if row["source"] == "pool"}


def members(work: Project) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Image bytes and lineage JSON by the sample's key."""
    found: dict[str, dict[str, bytes]] = {}
    for path in (work.run_folder / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]
                found.setdefault(key, {})["json" if ext == "json" else "image"] = data
    return {key: (one["image"], json.loads(one["json"])) for key, one in found.items()}


@pytest.mark.parametrize("route", ROUTES)
def test_a_filter_scores_by_each_route_and_reporting_changes_no_byte(
    project: Callable[..., Project], tmp_path: Path, route: Callable[..., Any]
) -> None:
    path, given = route(tmp_path)
    model = {"weights": str(path), "size": SIDE, **given}
    work = photographs(project, filter={**model, "mode": "report"})
    assert work.run() == 0
    scores, rows = expected(path, given, work), pool_rows(work)
    for name, score in scores.items():
        assert rows[name]["unsafe"] == pytest.approx(score, abs=1e-3)
        assert rows[name]["decision"] == "selected"
    assert counts(work.run_folder, "embed")["unsafe"] >= sum(s >= 0.5 for s in scores.values())
    files = (work.folder / "pool").iterdir()
    originals = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    written = members(work)
    assert originals <= set(written)
    assert all(hashlib.sha256(data).hexdigest() == key for key, (data, _) in written.items())

    threshold = round(sorted(scores.values())[4] - 1e-3, 4)
    work.recipe["safety"] = {"filter": {**model, "mode": "drop", "threshold": threshold}}
    work.recipe["failures"] = {"max_share": 1.0}
    assert work.run() == 0
    rows = pool_rows(work)
    dropped = {name for name, score in scores.items() if score >= threshold}
    assert 0 < len(dropped) < len(scores)
    for name, row in rows.items():
        assert (row["decision"] == "rejected") == (name in dropped), (name, row)
        assert row["reason"].startswith("unsafe score ") or name not in dropped
    assert not {row["id"] for row in rows.values() if row["reason"].startswith("unsafe")} & set(
        members(work)
    )


def test_an_image_without_a_score_is_not_taken_for_safe(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean(dim=[1, 2, 3])
            return torch.stack([mean, torch.log(mean - mean.abs() - 1)], dim=1)

    torch.jit.script(Nothing()).save(str(tmp_path / "nan.pt"))
    model = {"weights": str(tmp_path / "nan.pt"), "size": SIDE, "mode": "drop"}
    work = photographs(project, filter=model)
    assert work.run() == 1  # not one image is left


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": "nowhere.pt"}, "safety.filter.weights"),
        ({"weights": "recipe.yaml"}, "safety.filter.weights: not a TorchScript file"),
        ({"weights": "bad.onnx"}, "safety.filter.weights: not an ONNX model"),
        ({"weights": "filter.onnx", "unsafe": [5]}, "the model has classes 0 to 1, not 5"),
        ({"weights": "bad.onnx", "model": "test_vit"}, "neither a safetensors file nor"),
        ({"weights": "filter.onnx", "mode": "off"}, "must be 'report' or 'drop'"),
    ],
)
def test_a_filter_that_cannot_be_used_is_one_clear_line(
    project: Callable[..., Project],
    capsys: pytest.CaptureFixture[str],
    given: dict[str, Any],
    said: str,
) -> None:
    work = project(pool=range(3))
    as_onnx(work.folder)
    (work.folder / "bad.onnx").write_bytes(b"no model")
    (work.folder / "recipe.yaml").write_text("x")
    given = {"size": SIDE, **given, "weights": str(work.folder / given["weights"])}
    work.recipe["safety"] = {"filter": given}
    assert work.run() == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


@pytest.mark.skipif(find_spec("nudenet") is None, reason="the extra nsfw is not installed")
def test_the_ready_model_of_the_extra_passes_harmless_photographs(
    project: Callable[..., Project],
) -> None:
    work = photographs(project, filter={"weights": "nudenet", "mode": "drop", "threshold": 0.4})
    assert work.run() == 0
    rows = pool_rows(work)
    assert {row["decision"] for row in rows.values()} == {"selected"}
    assert all(0 <= row["unsafe"] < 0.4 for row in rows.values())


def face_of_astronaut(image: Image.Image) -> float:
    """How much detail is left where the face is: the mean step between neighbouring pixels."""
    face = np.asarray(image.convert("L").crop((180, 70, 270, 170)), np.float32)
    return float(np.abs(np.diff(face, axis=1)).mean())


def test_faces_are_blurred_where_they_are_and_only_there(
    project: Callable[..., Project],
) -> None:
    work = photographs(project, faces={"detector": "haar"})
    assert work.run() == 0
    rows, written = pool_rows(work), members(work)
    astronaut = rows["astronaut.jpg"]
    assert astronaut["faces_blurred"] == 1
    data, story = written[astronaut["id"]]
    assert story["faces_blurred"] == 1
    before = Image.open(work.folder / "pool" / "astronaut.jpg").convert("RGB")
    after = Image.open(io.BytesIO(data))
    assert (after.format, after.size) == ("JPEG", before.size)
    assert face_of_astronaut(after) < 0.35 * face_of_astronaut(before)
    change = np.abs(np.asarray(before, np.int16) - np.asarray(after.convert("RGB"), np.int16))
    assert change[300:].mean() < 1.5  # the suit is as it was, but for JPEG
    for name in ("coffee.png", "brick.jpg", "moon.jpg", "rocket.jpg"):
        assert rows[name]["faces_blurred"] is None
        data, story = written[rows[name]["id"]]
        assert hashlib.sha256(data).hexdigest() == rows[name]["id"]
        assert "faces_blurred" not in story
    index = (work.run_folder / "shards").glob("*.index.parquet")
    digests = {r["member"]: r["sha256"] for p in index for r in pq.read_table(p).to_pylist()}
    assert (
        digests[f"{astronaut['id']}.jpg"] == hashlib.sha256(written[astronaut["id"]][0]).hexdigest()
    )


def test_without_being_asked_no_face_is_touched(project: Callable[..., Project]) -> None:
    work = photographs(project)
    assert work.run() == 0
    rows, written = pool_rows(work), members(work)
    assert {row["faces_blurred"] for row in rows.values()} == {None}
    assert all(hashlib.sha256(data).hexdigest() == key for key, (data, _) in written.items())


def ultraface(folder: Path) -> Path:
    """A detector of UltraFace's form that always finds one face at (.35, .15) to (.55, .35)."""
    arrays = {
        "zero": np.zeros((1, 3, 240, 320), np.float32),
        "found": np.array([[[0.1, 0.9], [0.9, 0.1]]], np.float32),
        "places": np.array([[[0.35, 0.15, 0.55, 0.35], [0.0, 0.0, 1.0, 1.0]]], np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["input", "zero"], ["nothing"]),
        helper.make_node("ReduceMean", ["nothing"], ["none"], keepdims=0),
        helper.make_node("Add", ["found", "none"], ["scores"]),
        helper.make_node("Add", ["places", "none"], ["boxes"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "faces",
        [value("input", TensorProto.FLOAT, [1, 3, 240, 320])],
        [
            value("scores", TensorProto.FLOAT, [1, 2, 2]),
            value("boxes", TensorProto.FLOAT, [1, 2, 4]),
        ],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return _saved(graph, folder / "faces.onnx")


def test_a_detector_by_uri_blurs_what_it_finds(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    work = photographs(project, faces={"detector": str(ultraface(tmp_path))})
    assert work.run() == 0
    rows, written = pool_rows(work), members(work)
    assert {row["faces_blurred"] for row in rows.values()} == {1}
    before = Image.open(work.folder / "pool" / "coffee.png").convert("RGB")
    after = Image.open(io.BytesIO(written[rows["coffee.png"]["id"]][0]))
    assert after.format == "PNG"
    change = np.abs(np.asarray(before, np.int16) - np.asarray(after.convert("RGB"), np.int16))
    width, height = before.size
    inside = change[int(0.2 * height) : int(0.3 * height), int(0.4 * width) : int(0.5 * width)]
    assert inside.mean() > 3
    assert change[int(0.45 * height) :].max() == 0


def test_a_file_that_is_no_detector_is_told(
    project: Callable[..., Project], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = as_onnx(tmp_path)
    work = photographs(project, faces={"detector": str(path)})
    assert work.run() == 2
    assert "safety.faces.detector: an ONNX detector needs" in capsys.readouterr().err

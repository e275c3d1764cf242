"""Recipes are judged before a cluster sees them. (Real jobs: end_to_end/test_ray.py.)"""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml
from served import served
from workbench import Project

from curation.service.client import ApiError, Client

TOKEN = "submit-token-0123456789"
NOBODY = "http://127.0.0.1:9"  # the port of `discard`


def test_bad_recipes_and_a_cluster_that_does_not_answer(project: Callable[..., Project]) -> None:
    work = project(pool=range(2))
    runs = work.folder / "runs"
    runs.mkdir()
    good = work.recipe | {"output": str(runs / "new")}

    def changed(**fields: object) -> str:
        return yaml.safe_dump(good | fields)

    bombs = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    cases = [
        ("[", "recipe: line"),
        ("just text", "a recipe is a mapping"),
        (bombs, "anchors and aliases"),
        (changed(name=""), "name"),
        (changed(nonsense=1), "nonsense"),
        (changed(output=str(runs)), f"it must lie below {runs}/"),
        (changed(output=str(runs / ".." / "elsewhere")), "it must lie below"),
        (changed(output="s3://bucket/x"), "it must lie below"),
        (changed(output="runs/relative"), "it must lie below"),
    ]
    options = ("--ray-dashboard", NOBODY)
    with (
        served(runs, *options, LVD_SUBMIT_TOKENS=TOKEN) as service,
        Client(service.url, TOKEN) as client,
    ):
        for recipe, text in cases:
            with pytest.raises(ApiError, match=text) as error:
                client.submit(recipe)
            assert error.value.status == 422, recipe
            assert "\n" not in str(error.value)
        with pytest.raises(ApiError, match="the Ray cluster does not answer") as error:
            client.submit(changed())
        assert error.value.status == 502
        with pytest.raises(ApiError, match="no job 'raysubmit_1'") as error:
            client.job("raysubmit_1")  # another's on the same cluster
        assert error.value.status == 404
        answer = httpx.get(f"{service.url}/api/jobs/lvd-0123456789abcdef")
        assert answer.status_code == 401


def test_a_recipe_comes_from_standard_input(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import io

    from curation.cli import main

    work = project(pool=range(3))
    monkeypatch.setattr("sys.stdin", io.StringIO(yaml.safe_dump(work.recipe)))
    assert main(["run", "-", "--ray", "off", "--until", "ingest"]) == 0
    assert (work.run_folder / "ingest" / "done.json").exists()

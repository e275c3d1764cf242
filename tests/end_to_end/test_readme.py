"""Every command and example of the README, as a new user would run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from curation import recipe
from curation.cli import main
from demo import __main__ as demo
from demo import images

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python in `folder` with the project's root on its path, as `make` does."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_recipe_of_the_readme_is_valid() -> None:
    (text,) = blocks("yaml")
    parsed = recipe.parse(text, "README.md", [])
    assert parsed.name == "birds"
    assert parsed.sources.curated["birds"].cluster is not None


def test_the_starter_recipe_is_valid_and_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    assert main(["init", str(path), "--pool", "my: pool, {x}", "--like", "~/seeds #1"]) == 0
    parsed = recipe.load(path)
    assert parsed.sources.pool[0].uri == "my: pool, {x}"
    assert parsed.sources.curated["wanted"].uri == "~/seeds #1"
    assert main(["init", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_and_everything_the_readme_does_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = python(tmp_path, "-m", "demo", "", "")
    assert made.returncode == 0, made.stderr
    for words in ("pool images", "written", "read back", "known copies found", "report.html"):
        assert words in made.stdout
    for example in blocks("python"):
        result = python(tmp_path, "-c", example)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()
    commands = [
        ("status", "runs/demo/run"),
        ("why", "runs/demo/run", "broken-page.jpg"),
        ("retry", "runs/demo/run"),
        ("report", "runs/demo/run"),
        ("lineage", "runs/demo/run", "--out", "lineage.parquet"),
    ]
    changed = ("run", "runs/demo/run.yaml", "--set", "cluster.k=10", "--until", "retrieve")
    monkeypatch.chdir(tmp_path)
    for command in (*commands, (*changed, "--ray", "off")):
        assert main(command) == 0, command


@pytest.mark.slow
def test_the_demo_on_ones_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "OTHERS", ("coins",))  # fewer than in the demo
    images.make(tmp_path / "own")
    result = python(tmp_path, "-m", "demo", "own/pool", "own/curated")
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "runs" / "mine" / "shards").glob("*.tar"))
    assert demo.main(["own/pool", ""]) == 2

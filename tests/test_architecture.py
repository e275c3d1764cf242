"""The import rules of the house: tables, maths, runtime, stages, commands, each below the next."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {
    "curation.schema": set(),
    "curation.algorithms": {"curation.schema"},
    "curation.images": {"curation.schema"},
    "curation.web": set(),
    "curation.runtime": {"curation.schema"},
    "curation.recipe_faults": set(),
    "curation.recipe_modes": {"curation.recipe_faults"},
    "curation.recipe_intake": {"curation.recipe_modes"},
    "curation.recipe": {
        "curation.recipe_faults",
        "curation.recipe_intake",
        "curation.recipe_modes",
    },
    "curation.stages": {
        "curation.schema",
        "curation.algorithms",
        "curation.images",
        "curation.runtime",
        "curation.web",
    },
    "curation.service": {"curation.schema", "curation.runtime"},
}


def modules(package: str) -> Iterator[tuple[str, set[str]]]:
    """(module, everything it imports) for every file of a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import"
                assert node.module is not None
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        yield name, imported


def inside(module: str, packages: set[str]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_lies_below_it(layer: str) -> None:
    for name, imported in modules("curation"):
        if not inside(name, {layer}):
            continue
        for target in imported:
            if inside(target, {"curation"}):
                assert inside(target, LAYERS[layer] | {layer}), f"{name} imports {target}"


def test_only_one_file_knows_ray() -> None:
    knowing = {n for n, used in modules("curation") if any(inside(t, {"ray"}) for t in used)}
    assert knowing == {"curation.runtime.ray_executor"}


def test_the_maths_knows_no_io() -> None:
    forbidden = {"os", "io", "pathlib", "time", "random", "boto3", "pyarrow", "shutil", "tempfile"}
    for name, imported in modules("curation"):
        if inside(name, {"curation.algorithms"}):
            bad = {target for target in imported if inside(target, forbidden)}
            assert not bad, f"{name} imports {bad}"


def test_only_commands_know_the_service_and_only_it_knows_the_web() -> None:
    commands = {"curation.cli", "curation.serving"}
    web = {"fastapi", "starlette", "uvicorn", "prometheus_client"}
    for name, imported in modules("curation"):
        if inside(name, {"curation.service"}):
            continue
        assert not any(inside(target, web) for target in imported), name
        if name not in commands:
            assert not any(inside(target, {"curation.service"}) for target in imported), name


def test_the_service_only_reads() -> None:
    """It calls nothing of a store that writes."""
    writing = {"write", "publish", "append", "delete"}
    for path in (ROOT / "curation" / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in writing:
                assert "store" not in ast.unparse(node.value), f"{path.name}:{node.lineno}"


def test_pretrain_and_curation_do_not_know_each_other() -> None:
    for package, other in (("curation", "pretrain"), ("pretrain", "curation")):
        for name, imported in modules(package):
            assert not any(inside(t, {other}) for t in imported), f"{name} imports {other}"


def test_only_one_file_knows_torch_distributed() -> None:
    for name, used in modules("pretrain"):
        known = {target for target in used if inside(target, {"torch.distributed"})}
        if name == "pretrain.checkpoint":  # its file format is one of torch.distributed
            known = {target for target in known if "checkpoint" not in target}
        assert not known or name == "pretrain.distributed", f"{name} imports {known}"


def test_package_files_are_empty() -> None:
    for path in [
        *(ROOT / "curation").rglob("__init__.py"),
        *(ROOT / "pretrain").rglob("__init__.py"),
    ]:
        assert path.read_text() == "", f"{path} is not empty"

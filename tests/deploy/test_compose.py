"""docker-compose.yml, the Dockerfile and the demo job, by the tools that would run them."""

import re
import shlex
import tomllib
from typing import Any

import yaml
from judges import ROOT, judge
from packaging.requirements import Requirement

from curation.cli import _parser

COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return found


def test_compose_follows_its_schema() -> None:
    done = judge("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert done.returncode == 0, done.stdout


def test_compose_itself_reads_it() -> None:
    done = judge("docker-compose", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services["service"]["environment"]["AWS_ENDPOINT_URL"] == "http://s3:8333"


def test_the_service_takes_its_command_and_knows_the_cluster() -> None:
    options = _parser().parse_args(shlex.split(compose()["services"]["service"]["command"])[1:])
    assert options.ray_dashboard == "http://ray-head:8265"


def test_ports_are_open_to_this_machine_alone() -> None:
    ports = [
        port for service in compose()["services"].values() for port in service.get("ports", ())
    ]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_are_named_with_a_version() -> None:
    for service in compose()["services"].values():
        assert re.search(r":[a-z0-9.]+$", service["image"]), service["image"]
        assert not service["image"].endswith(":latest")


def test_what_is_mounted_is_there() -> None:
    mounts = [m for s in compose()["services"].values() for m in s.get("volumes", ())]
    local = [mount.split(":")[0] for mount in mounts if mount.startswith("./")]
    assert local
    assert all((ROOT / path).is_dir() for path in local)


def test_the_dockerfile_is_clean() -> None:
    done = judge("hadolint", str(DOCKERFILE))
    assert done.returncode == 0, done.stdout


def test_targets_of_the_dockerfile_are_those_in_use() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE.read_text(), re.M))
    assert {"cpu", "gpu", "v100"} <= targets
    assert compose()["services"]["service"]["build"]["target"] in targets


def test_a_torch_for_v100_is_one_that_has_its_kernels() -> None:
    """PyPI's builds have sm_70 up to 2.10; the project must work with one of those."""
    v100 = DOCKERFILE.read_text().split(" AS v100")[1]
    version = re.search(r"torch==(\S+)", v100)
    assert version is not None
    assert tuple(map(int, version[1].split(".")[:2])) <= (2, 10)
    assert Requirement(project()["torch"]).specifier.contains(version[1])


def project() -> dict[str, str]:
    """Dependencies of the project by name."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {Requirement(line).name: line for line in lines}


def test_pinned_versions_are_ones_that_the_project_allows() -> None:
    pinned = [
        Requirement(line)
        for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert len(pinned) > 10
    for one in pinned:
        version = next(iter(one.specifier)).version
        allowed = Requirement(project().get(one.name, one.name)).specifier
        assert allowed.contains(version), f"{one} is not in {allowed}"

"""Ray's cluster launcher file."""

import copy
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from judges import ROOT
from ray.autoscaler._private.util import prepare_config, validate_config

LAUNCHER = ROOT / "deploy" / "ray-cluster.yaml"


def launcher() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(LAUNCHER.read_text())
    return found


def test_the_launcher_file_follows_rays_schema() -> None:
    validate_config(prepare_config(launcher()))


def test_rays_schema_can_say_no() -> None:
    wrong = copy.deepcopy(launcher())
    wrong["available_node_types"]["cpu"]["max_worker"] = 1
    with pytest.raises(ValidationError):
        validate_config(prepare_config(wrong))


def test_work_goes_to_spot_machines_and_the_head_has_none() -> None:
    given = launcher()
    kinds = given["available_node_types"]
    assert kinds[given["head_node_type"]]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in kinds["head"]["node_config"]
    workers = [kind for name, kind in kinds.items() if name != "head"]
    assert all("InstanceMarketOptions" in kind["node_config"] for kind in workers)

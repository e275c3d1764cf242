"""Every overlay as kubectl builds it, against the schemas of Kubernetes and of KubeRay."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from judges import ROOT, judge

from curation.cli import _parser

OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
KUBERAY = ("rayclusters", "rayjobs")


@pytest.fixture(scope="module", params=OVERLAYS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of an overlay."""
    done = judge("kubectl", "kustomize", f"k8s/overlays/{request.param}")
    assert done.returncode == 0, done.stderr
    path = tmp_path_factory.mktemp("k8s") / f"{request.param}.yaml"
    path.write_text(done.stdout)
    return path


def objects(built: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(built.read_text()) if one]


def pods(value: Any) -> list[dict[str, Any]]:
    """Every pod's spec, wherever it is."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            return [value]
        return [pod for inner in value.values() for pod in pods(inner)]
    return [pod for inner in value for pod in pods(inner)] if isinstance(value, list) else []


def test_the_three_overlays_are_there() -> None:
    assert OVERLAYS == ["hopper", "local", "v100"]


def test_objects_of_kubernetes_follow_its_schemas(built: Path) -> None:
    done = judge("kubernetes-validate", "--strict", str(built))
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert told.count("passed for resource") == sum(
        one["apiVersion"] != "ray.io/v1" for one in objects(built)
    )


def test_the_service_takes_its_command_and_knows_the_cluster(built: Path) -> None:
    found = {(one["kind"], one["metadata"]["name"]): one for one in objects(built)}
    (container,) = pods(found["Deployment", "service"])[0]["containers"]
    (cluster,) = (name for kind, name in found if kind == "RayCluster")
    options = _parser().parse_args(container["command"][1:])
    assert options.ray_dashboard == f"http://{cluster}-head-svc:8265"


@pytest.mark.parametrize("kind", KUBERAY)
def test_objects_of_kuberay_follow_its_definitions(
    built: Path, kind: str, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script, crd = shared / "tools" / "kuberay_check.py", shared / "kuberay" / f"ray.io_{kind}.yaml"
    if not script.is_file() or not crd.is_file():
        pytest.skip("KubeRay's definitions are not here")
    spec = importlib.util.spec_from_file_location("kuberay_check", script)
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    assert check.main(str(crd), str(built)) == 0, capsys.readouterr().out


def test_every_pod_is_bounded_and_without_rights(built: Path) -> None:
    """What the namespace's `restricted` standard asks for, and requests of every container."""
    found = [pod for one in objects(built) for pod in pods(one)]
    assert len(found) >= 7
    for pod in found:
        context = pod["securityContext"]
        assert context["runAsNonRoot"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            locked = container["securityContext"]
            assert locked["allowPrivilegeEscalation"] is False
            assert locked["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]
            assert ":" in container["image"].rpartition("/")[2], "an image without a tag"


def test_what_pods_name_is_there(built: Path) -> None:
    """ConfigMaps and claims by their names: kustomize can't see into KubeRay's objects."""
    there = {(one["kind"], one["metadata"]["name"]) for one in objects(built)}
    for pod in (pod for one in objects(built) for pod in pods(one)):
        for volume in pod.get("volumes", ()):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in there
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in there
        for container in pod["containers"]:
            for given in container.get("envFrom", ()):
                if "configMapRef" in given:
                    assert ("ConfigMap", given["configMapRef"]["name"]) in there


def test_the_job_has_a_cluster_like_the_standing_one(built: Path) -> None:
    cluster, job = (
        next(one["spec"] for one in objects(built) if one["kind"] == kind)
        for kind in ("RayCluster", "RayJob")
    )
    assert job["rayClusterSpec"] == cluster
    assert job["suspend"]


def test_pretraining_has_as_many_pods_as_torchrun_waits_for(built: Path) -> None:
    job = next(one for one in objects(built) if one["kind"] == "Job")["spec"]
    container = job["template"]["spec"]["containers"][0]
    given = {one["name"]: one["value"] for one in container["env"]}
    assert job["completions"] == job["parallelism"] == int(given["NODES"])
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", 1)
    assert int(given["GPUS"]) == gpus
    if built.stem == "v100":
        assert (given["NODES"], given["GPUS"]) == ("20", "8")


def test_ray_is_one_version_everywhere(built: Path) -> None:
    constraints = (ROOT / "deploy" / "constraints.txt").read_text().split()
    cluster = next(one for one in objects(built) if one["kind"] == "RayCluster")
    assert f"ray=={cluster['spec']['rayVersion']}" in constraints

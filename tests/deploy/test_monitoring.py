"""Prometheus' rules and Grafana's queries: they parse, fire in time, name what is exported."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from judges import ROOT, judge

from curation.service.metrics import GAUGES, Requests

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "lvd.json"
HISTOGRAM = re.compile(r"_(bucket|sum|count)$")


def exported_names() -> set[str]:
    """Every metric of the service; a histogram by its own name."""
    families = Requests().registry.collect()
    own = {f"{one.name}_total" if one.type == "counter" else one.name for one in families}
    return {*GAUGES, *own}


def queries() -> dict[str, str]:
    """Every query of the dashboard by its panel, with Grafana's variables filled in."""
    found = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$run", ".*").replace("$__rate_interval", "5m")
            found[f"{panel['id']} {panel['title']} {target['refId']}"] = query
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names(text: str) -> set[str]:
    return {HISTOGRAM.sub("", name) for name in re.findall(r"\blvd_[a-z_]+", text)}


def test_rules_and_dashboard_name_only_what_is_exported() -> None:
    exported = {HISTOGRAM.sub("", name) for name in exported_names()}
    used = names(DASHBOARD.read_text()) | names("\n".join(rule["expr"] for rule in alerts()))
    assert len(used) > 10
    assert used <= exported


def test_the_configuration_is_one_that_prometheus_reads() -> None:
    done = judge("promtool", "check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_of_the_dashboard_parse(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": query} for n, query in enumerate(queries().values())]
    assert len(rules) > 10
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = judge("promtool", "check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should(tmp_path: Path) -> None:
    cases = yaml.safe_load((Path(__file__).parent / "alerts.test.yml").read_text())
    proved = {
        case["alertname"]
        for test in cases["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    assert proved == {rule["alert"] for rule in alerts()}
    path = tmp_path / "alerts.test.yml"
    path.write_text(yaml.safe_dump({**cases, "rule_files": [str(PROMETHEUS / "alerts.yml")]}))
    done = judge("promtool", "test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_is_given_what_it_looks_for() -> None:
    folder = ROOT / "deploy" / "grafana" / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "lvd.yml").read_text())["datasources"]
    providers = yaml.safe_load((folder / "dashboards" / "lvd.yml").read_text())["providers"]
    dashboard = json.loads(DASHBOARD.read_text())
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"] if "targets" in panel}
    assert used == {source["uid"] for source in sources}
    assert any(
        mount.split(":")[1] == providers[0]["options"]["path"] for mount in grafana["volumes"]
    )
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))

"""cluster/monitoring: every metric that an alert or a panel asks for is one that the endpoint or Ray exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from serving import metrics, written

MONITORING = Path(__file__).resolve().parent.parent / "cluster" / "monitoring"
GRAFANA = MONITORING / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
#: Ray's own panels: the names and labels of what the installed version exports.
RAYS = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
NAME = re.compile(r"\b(?:s2t|ray|autoscaler)_[a-z0-9_]+\b")
#: What the endpoint's page and Prometheus add to our labels.
ADDED = {"replica", "le", "job", "instance"}


def ours() -> dict[str, set[str]]:
    """Each series of `GET /metrics` with its labels, and those that Ray exports for us."""
    found = {f"ray_{written.TOKENS}_total": {"engine", "kind"}, f"ray_{written.RUNNING}": {"engine"}}
    for collector, names in metrics.REGISTRY._collector_to_names.items():
        labels = set(collector._labelnames)  # type: ignore[attr-defined]
        found |= dict.fromkeys(names, labels)
    return found


def rays() -> set[str]:
    return set(NAME.findall("\n".join(path.read_text() for path in RAYS.glob("*_panels.py"))))


def dashboard(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every alert, panel and variable."""
    for group in rules()["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for path in DASHBOARDS:
        for panel in dashboard(path)["panels"]:
            for target in panel.get("targets", []):
                yield panel["title"], target["expr"]
        for variable in dashboard(path)["templating"]["list"]:
            yield variable["name"], variable["query"]["query"]


def rules() -> dict[str, Any]:
    return yaml.safe_load((MONITORING / "rules.yaml").read_text())


def unknown(expression: str) -> set[str]:
    """Names in PromQL that nothing exports, and labels that our metrics have not got."""
    known = ours()
    bare = re.sub(r"\b(?:by|without|on) \([^)]*\)|\{[^}]*\}", "", expression)
    missing = {name for name in NAME.findall(bare) if name not in known.keys() | rays()}
    for name, selector in re.findall(r"(\w*s2t_\w+)\{([^}]*)\}", expression):
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        missing |= {f"{name}.{label}" for label in used - known.get(name, set()) - ADDED}
    for grouped in re.findall(r"by \(([^)]*)\) \((?:rate\()?(\w*s2t_\w+)", expression):
        used = {label.strip() for label in grouped[0].split(",")}
        missing |= {f"{grouped[1]}.{label}" for label in used - known.get(grouped[1], set()) - ADDED}
    return missing


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_what_is_asked_for_is_exported(where, expression):
    assert unknown(expression) == set()
    assert NAME.search(expression) or expression.startswith("up{")


@pytest.mark.parametrize(
    ("expression", "missing"),
    [
        ("sum(rate(s2t_request_total[5m]))", {"s2t_request_total"}),
        ('s2t_requests_total{code="500"}', {"s2t_requests_total.code"}),
        ("sum by (engine) (rate(s2t_decisions_total[5m]))", {"s2t_decisions_total.engine"}),
        ("sum(ray_serve_replica_queries)", {"ray_serve_replica_queries"}),
    ],
)
def test_what_nothing_exports_is_found(expression, missing):
    assert unknown(expression) == missing


def test_the_endpoint_and_its_dashboard_speak_of_the_same():
    """Each of our metrics is somewhere to be seen."""
    shown = set(NAME.findall(" ".join(expression for _, expression in expressions())))
    families = {metric.name for metric in metrics.REGISTRY.collect()} | {
        f"ray_{written.TOKENS}",
        f"ray_{written.RUNNING}",
    }
    assert [name for name in families if not any(series.startswith(name) for series in shown)] == []


def test_alerts_are_on_reasons_and_statuses_that_there_are():
    """The reasons stand in serving/ as they are counted."""
    sources = "\n".join(path.read_text() for path in (MONITORING.parent.parent / "serving").glob("*.py"))
    counted = set(re.findall(r'metrics\.refused\("(\w+)"\)', sources))
    asked = {reason for _, expression in expressions() for reason in re.findall(r'reason="(\w+)"', expression)}
    assert asked
    assert asked <= counted


def test_prometheus_reads_the_rules_and_asks_the_endpoint():
    for path in MONITORING.glob("prometheus*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert all((MONITORING / file).is_file() for file in config["rule_files"])
        assert [job["job_name"] for job in config["scrape_configs"]] == ["ray", "s2t"]
    jobs = {job for _, expression in expressions() for job in re.findall(r'up\{job="(\w+)"\}', expression)}
    assert jobs == {"s2t"}


def test_grafana_finds_the_data_for_its_panels():
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    boards = [dashboard(path) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len(boards) == 2
    for board in boards:
        panels = board["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
        assert len(places) == len(panels), "no panel lies on another"
        for panel in panels:
            if panel["type"] != "row":
                assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}

"""examples/monitoring: names, ports and paths are those of the source.

No container is started: neither Docker nor promtool nor Grafana is asked, so that a query may still
be wrong where its names are right.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.config.presets import load_serve_config
from coordinator.config.scoring import SCORES
from coordinator.tracking.names import DEVICE_NUMBERS, RUN_NUMBERS
from coordinator.tracking.to_prometheus import PATH, metric_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "monitoring"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "edgesplit.json"
# Labels of ours, and those that Prometheus adds.
LABELS = {"run", "device", "model", "job", "instance"}
COLUMNS = 24


def metrics() -> set[str]:
    """Return the names of all metrics at `/metrics`."""
    tables = ((RUN_NUMBERS, False), (DEVICE_NUMBERS, True))
    return {"edgesplit_run_info"} | {
        metric_name(name, of_device=of_device) + "_total" * meaning.is_total
        for table, of_device in tables
        for name, meaning in table.items()
    }


def load(name: str) -> Any:
    """Return what a file of YAML or JSON says."""
    return yaml.safe_load((FOLDER / name).read_text("utf-8"))


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return found


def expressions() -> list[str]:
    """Return every query of the dashboard and of the alerts."""
    board = dashboard()
    drawn = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    chosen = [variable["query"]["query"] for variable in board["templating"]["list"]]
    rules = [rule["expr"] for group in load("alerts.yml")["groups"] for rule in group["rules"]]
    return drawn + chosen + rules


@pytest.mark.parametrize("query", sorted(set(expressions())))
def test_a_query_asks_for_what_there_is(query: str) -> None:
    """Metrics and labels exist, what only grows is asked for its rate or as it is, braces close."""
    assert set(re.findall(r"edgesplit_\w+", query)) <= metrics()
    assert set(re.findall(r"(\w+)\s*=~?\"", query)) <= LABELS
    assert all(query.count(left) == query.count(right) for left, right in ("()", "{}", "[]"))
    for name in re.findall(r"(?:rate|increase)\((\w+)", query):
        assert name.endswith("_total")


def test_every_number_is_drawn() -> None:
    """What the dashboard leaves out are sums, scores of devices beside their loss, and the test."""
    drawn = {name for query in expressions() for name in re.findall(r"edgesplit_\w+", query)}

    assert metrics() - drawn == {
        "edgesplit_device_eval_accuracy",
        "edgesplit_device_eval_perplexity",
        "edgesplit_traffic_down_bytes_total",
        "edgesplit_traffic_up_bytes_total",
        "edgesplit_test_loss",
        "edgesplit_test_accuracy",
        "edgesplit_test_perplexity",
        *(f"edgesplit_test_{name}" for name in SCORES),
    }


def test_panels_lie_side_by_side() -> None:
    """Each has a number and a title of its own, the provisioned source, and a place to itself."""
    panels = dashboard()["panels"]
    source = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= COLUMNS
        assert not cells & taken
        taken |= cells
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert {each["uid"] for each in sources} == {source["uid"]}

    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels if panel["type"] == "timeseries"}) == sum(
        panel["type"] == "timeseries" for panel in panels
    )


def test_the_coordinator_takes_its_command(tmp_path: Path) -> None:
    """What compose tells it is a run that reports to Prometheus, where that asks, by that token."""
    services = load("compose.yaml")["services"]
    command = services["coordinator"]["command"]
    (tmp_path / "run.yaml").write_text("model: m\nname: lab\n")
    overrides = [word for word in command if "=" in word]
    scrape = load("prometheus.yml")["scrape_configs"][0]

    config = load_serve_config(tmp_path / "run.yaml", overrides, {})

    host, port = config.tracking.prometheus_place
    assert config.report_to == ("prometheus",)
    assert (host, scrape["static_configs"][0]["targets"]) == ("0.0.0.0", [f"coordinator:{port}"])
    assert scrape["metrics_path"] == PATH
    assert scrape["authorization"] == {
        "type": "Bearer",
        "credentials_file": str(config.tracking.prometheus_token),
    }
    assert config.tracking.prometheus_token == Path("/run/secrets/metrics_token")
    assert services["coordinator"]["secrets"] == services["prometheus"]["secrets"]
    assert command[:4] == ["serve", "--config", "run.yaml", "--resume"]


def test_what_is_mounted_is_there() -> None:
    """Files of the example lie where compose takes them from, and land where programs look."""
    services = load("compose.yaml")["services"]
    mounts = {}
    for service in services.values():
        for mount in service.get("volumes", []):
            here, there = mount.split(":")[:2]
            mounts[there] = here
    provider = load("grafana/provisioning/dashboards/edgesplit.yaml")["providers"][0]
    source = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]

    assert [
        here for here in mounts.values() if here[0] == "." and not (FOLDER / here).exists()
    ] == []
    assert (FOLDER / mounts[provider["options"]["path"]] / "edgesplit.json").is_file()
    assert {"prometheus.yml", *load("prometheus.yml")["rule_files"]} <= {
        Path(there).name for there in mounts
    }
    assert source["url"] == "http://prometheus:9090"
    extended = services["coordinator"]["extends"]
    whole = yaml.safe_load((FOLDER / extended["file"]).read_text("utf-8"))
    assert extended["service"] in whole["services"]
    assert whole["volumes"].keys() <= load("compose.yaml")["volumes"].keys()


def test_only_this_machine_may_look() -> None:
    """Prometheus and Grafana listen at loopback; the page itself is on no port of the host."""
    services = load("compose.yaml")["services"]

    for name in ("prometheus", "grafana"):
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
    assert "ports" not in services["coordinator"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_reads_its_files() -> None:
    """Its own tool finds nothing wrong with the alerts."""
    command = ["promtool", "check", "rules", "alerts.yml"]

    subprocess.run(command, cwd=FOLDER, check=True)

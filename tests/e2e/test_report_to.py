"""Numbers of a real run go where they are wanted, and what fails there costs it nothing."""

from __future__ import annotations

import csv
import urllib.request
from collections import Counter
from pathlib import Path

from coordinator.report.work import KINDS
from coordinator.results.history import RunHistory, overall
from coordinator.results.run_folder import RunFolder
from tests.e2e.cluster import Cluster
from tests.e2e.programs import Start, free_port
from tests.e2e.test_cli import NOISE


def read_table(folder: Path) -> list[dict[str, str]]:
    """The rows of numbers.csv."""
    with (folder / "trackers" / "numbers.csv").open() as file:
        return list(csv.DictReader(file))


def evaluations(rows: list[dict[str, str]]) -> dict[int, float]:
    """The run's evaluations by step."""
    own = [row for row in rows if (row["name"], row["device"]) == ("eval/loss", "")]
    return {int(row["step"]): float(row["value"]) for row in own}


def test_a_killed_run_goes_on_in_every_tracker(files: Cluster, start: Start) -> None:
    """Each step once, before and after a kill; a tracker without its server is told of once."""
    port = free_port()
    settings = (
        "rounds=6",
        "report_to=[csv, mlflow, prometheus]",
        "tracking.mlflow_uri=http://127.0.0.1:9",
        f"tracking.prometheus_address=127.0.0.1:{port}",
    )
    environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_DISABLE_TELEMETRY": "true"}
    killed = start("coordinator", "serve", "--config", "run.yaml", *settings, **environment)
    killed.wait_for("listening at")
    devices = [start("edge-sdk", "run", "--config", f"{name}.yaml") for name in "ab"]
    killed.wait_for("round  2")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30.0) as answer:
        page = answer.read().decode()
    killed.kill()

    resumed = start("coordinator", "resume", "runs/run", **environment)
    assert [program.wait() for program in (resumed, *devices)] == [0, 0, 0]

    run = RunFolder(files.folder / "runs" / "run")
    rows = read_table(run.path)
    counts = Counter((row["step"], row["name"], row["device"]) for row in rows)
    assert set(counts.values()) == {1}
    scores = {row["step"]: overall(row) for row in RunHistory(run).metrics}
    measured = {step: score.loss for step, score in scores.items() if score is not None}
    told = evaluations(rows)
    # What the killed process had been given and not yet written is not given again.
    assert len(told) >= len(measured) - 2
    assert told == {step: measured[step] for step in told}
    assert max(told) == max(measured)
    moved = [float(row["value"]) for row in rows if row["name"] == "traffic/up_bytes"]
    assert max(moved) <= sum(RunHistory(run).cost(name).bytes_up for name in "ab")
    assert 'edgesplit_run_info{model="' in page
    report = (run.path / "report.html").read_text("utf-8")
    always = {
        *("activations up", "activations down", "gradients up", "gradients down", "adapters up"),
        "round starts and residuals down",
    }
    # Parts of the model are fetched where an earlier run has not left them.
    maybe = {"parts of the model down"}
    assert {kind for kind in KINDS.values() if kind in report} - maybe == always
    for program in (killed, resumed):
        told_of = program.text.count("report_to: mlflow is left out from here on")
        assert told_of == 1 or (told_of == 0 and program is killed)  # before it could be told
        assert not [word for word in NOISE if word in program.text], program.text

"""examples/jetson: the app runs, configs load, unit and images say what README.md promises."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.config.presets import load_serve_config
from coordinator.lab.experiment.config import ExperimentConfig, load_experiment
from edge_sdk.client.backends import BACKENDS
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.doctor.packages import JETPACK_WHEELS
from edge_sdk.errors import (
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    DataError,
    ModelError,
    RefusedError,
)
from tests.e2e.cluster import Cluster, save_model, sentences
from tests.e2e.programs import Program, write_yaml

ROOT = Path(__file__).parents[1]
JETSON = ROOT / "examples" / "jetson"
UNIT = JETSON / "edgesplit-device.service"
IMAGES = sorted(path.name for path in JETSON.glob("Dockerfile.*"))
# A program cannot fail, load its libraries and fail again in less.
LEAST_RUN_S = 1.0


def text(name: str) -> str:
    """Return the text of a file of the example."""
    return (JETSON / name).read_text(encoding="utf-8")


def with_comments(name: str) -> str:
    """Return a config with the settings that it only suggests."""
    return re.sub(r"^# (?= *\w+:( |$))", "", text(name), flags=re.MULTILINE)


# ---- the app -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model."""
    return save_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def cluster(tmp_path: Path, model: Path) -> Iterator[Cluster]:
    """A coordinator for one device."""
    made = Cluster(tmp_path, model, tmp_path / "parts", ["a"])
    yield made
    made.close()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """The app's users' dialogs; one of them may not be learned from."""
    path = tmp_path / "dialogs.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE dialogs (question TEXT, answer TEXT, may_train INTEGER)")
        pairs = [(row["text"], row["text"], 1) for row in sentences(1)]
        connection.executemany("INSERT INTO dialogs VALUES (?, ?, ?)", pairs)
        connection.execute("INSERT INTO dialogs VALUES ('private', 'private', 0)")
    connection.close()
    return path


def start_app(cluster: Cluster, database: Path, *overrides: str, is_cold: bool = False) -> Program:
    """Start the app in the cluster's folder."""
    settings = {
        "coordinator": cluster.address,
        "server_key": cluster.public,
        "secret_key": "a.key",
        "cache": str(cluster.parts),
        "state": "state",
        "device": "cpu",
    }
    config = write_yaml(cluster.folder / "device.yaml", settings)
    arguments = (str(JETSON / "app.py"), str(database), str(config), *overrides)
    return Program("python", *arguments, cwd=cluster.folder, is_cold=is_cold)


def test_the_app_takes_part(cluster: Cluster, database: Path) -> None:
    """It trains on its database's rows to the end of the run; its losses are the coordinator's."""
    serving = cluster.serve(cluster.config(labels="device")).start()
    app = start_app(cluster, database, is_cold=True)

    assert (app.wait(), serving.wait()) == (0, "completed")

    losses = [row["train_loss_by_device"]["a"] for row in serving.rows[1:]]
    shown = [f"round {number}: loss {loss:.4f}" for number, loss in enumerate(losses, 1)]
    assert app.lines == ["taking part in run-1", *shown, "ended: the run is complete"]


def test_the_app_stops_when_told_to(cluster: Cluster, database: Path) -> None:
    """Ctrl-C ends it in order, and the coordinator is told."""
    serving = cluster.serve(cluster.config(rounds=1000)).start()
    app = start_app(cluster, database)
    app.wait_for("round 1")

    app.interrupt()

    assert app.wait() == 0
    assert app.lines[-1] == "ended: stopped"
    serving.coordinator.stop()
    serving.wait()


def test_the_app_says_what_is_wrong(cluster: Cluster, database: Path) -> None:
    """A wrong setting is one line and our exit code."""
    app = start_app(cluster, database, "patience_s=0")

    assert app.wait() == ConfigError.exit_code
    assert len(app.lines) == 1
    assert "patience_s" in app.text


# ---- configs -------------------------------------------------------------------------------------


def test_the_board_config_loads() -> None:
    """Every key exists, and files lie where the service may write."""
    config = load_config(ClientConfig, JETSON / "device.yaml", env={})

    assert config.state.parent == Path("/var/lib") / unit()["StateDirectory"][0]
    assert config.cache is not None
    assert config.cache.parent == Path("/var/cache") / unit()["CacheDirectory"][0]
    assert str(config.data.path).startswith(str(config.state.parent))


def test_the_run_config_loads() -> None:
    """It is the published method, planned for five boards."""
    config = load_serve_config(JETSON / "coordinator.yaml", env={})

    assert (config.preset, config.aggregation, config.min_devices) == ("hsplitlora", "fedex", 5)
    assert (config.planning.split, config.planning.ranks) == ("armsc", "rngwp")
    assert config.lora.lora_dropout == 0.0, "a board without torch would be refused"


def test_what_the_configs_suggest_loads(tmp_path: Path) -> None:
    """Settings in comments are real ones, too."""
    device, run = tmp_path / "device.yaml", tmp_path / "coordinator.yaml"
    device.write_text(with_comments("device.yaml"))
    run.write_text(with_comments("coordinator.yaml"))

    board, served = load_config(ClientConfig, device, env={}), load_serve_config(run, env={})

    assert (board.backend, board.base, board.chunk_bytes) == ("onnxruntime", "auto", 262144)
    assert board.profile.flops_per_s == 5e10
    assert (served.aggregation, served.evaluation.data.path) == ("stack", "dev.jsonl")
    assert served.devices["nano"].micro_batch == 1


def test_the_experiment_has_the_budgets_of_the_paper() -> None:
    """Five boards behind ssh, 5 to 20 GB in equal steps, with settings that a device takes."""
    config, methods = load_experiment(JETSON / "experiment.yaml", env={})

    budgets = [budget_of(config, name) for name in config.boards]
    assert budgets == [5e9, 8.75e9, 12.5e9, 16.25e9, 20e9]
    assert all(board.ssh for board in config.boards.values())
    assert list(methods) == ["hsplitlora", "splitlora"]


def budget_of(config: ExperimentConfig, name: str) -> float | None:
    """Return the memory that a board's own settings give to the run."""
    told = ("coordinator=tcp://example:7070", "server_key=key", *config.boards[name].settings)
    return load_config(ClientConfig, overrides=told, env={}).profile.memory_bytes


# ---- the unit ------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """Return the settings of the unit, each split into words."""
    lines = [line for line in text(UNIT.name).splitlines() if re.match(r"\w+=", line)]
    return {name: value.split() for name, _, value in (line.partition("=") for line in lines)}


def seconds(words: list[str]) -> float:
    """Return a time as systemd writes it, `15min` or `20`."""
    number, scale = re.fullmatch(r"(\d+)(min|s)?", words[0]).groups()  # type: ignore[union-attr]
    return int(number) * (60 if scale == "min" else 1)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """No key is unknown and no value is wrong; only the program is taken from elsewhere."""
    copy = tmp_path / UNIT.name
    copy.write_text(text(UNIT.name).replace("/opt/edgesplit/bin/edge-sdk", sys.executable))

    result = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )

    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_the_unit_is_killed_first_and_started_again() -> None:
    """The kernel prefers it to system services (score 0), and every abnormal end is retried."""
    settings = unit()

    assert 0 < int(settings["OOMScoreAdjust"][0]) <= 1000
    assert settings["OOMPolicy"] == ["kill"]
    assert settings["Restart"] == ["on-failure"]
    high, most = (int(settings[key][0].rstrip("%")) for key in ("MemoryHigh", "MemoryMax"))
    assert high < most < 100


def test_what_a_person_must_mend_is_not_retried() -> None:
    """Wrong settings, refusals, data and models stay down; a stop counts as success."""
    settings = unit()

    mended = {kind.exit_code for kind in (ConfigError, RefusedError, DataError, ModelError)}
    assert {int(code) for code in settings["RestartPreventExitStatus"]} == mended
    assert settings["SuccessExitStatus"] == [str(INTERRUPTED_EXIT_CODE)]


def test_restarts_cannot_become_a_storm() -> None:
    """A program that dies at once reaches the limit; one that waits for its coordinator never."""
    settings, config = unit(), load_config(ClientConfig, JETSON / "device.yaml", env={})
    burst, window_s = (
        int(settings["StartLimitBurst"][0]),
        seconds(settings["StartLimitIntervalSec"]),
    )
    pause_s = seconds(settings["RestartSec"])

    assert burst * (pause_s + LEAST_RUN_S) < window_s
    assert burst * (pause_s + config.patience_s) > window_s


def test_the_unit_waits_for_network_and_clock() -> None:
    """It starts after both, and does not fail where nobody provides them."""
    settings = unit()

    for target in ("network-online.target", "time-sync.target"):
        assert target in settings["After"]
        assert target in settings["Wants"]


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_pinned(name: str) -> None:
    """The base has a version; so has torch, where the image names one."""
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text(name), flags=re.MULTILINE))

    assert re.search(r":\w*\d+\.\d+", arguments["BASE"])
    assert re.findall(r"^FROM (\S+)$", text(name), flags=re.MULTILINE) == ["${BASE}"]
    assert re.fullmatch(r"torch==[\d.]+", arguments.get("TORCH", "torch==0"))


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_built_from_what_a_wheel_needs(name: str) -> None:
    """Everything that is copied exists, and the build finds all that pyproject.toml names."""
    copies = re.findall(r"^COPY (.+) (\S+)$", text(name), flags=re.MULTILINE)
    copied = {source for sources, _ in copies for source in sources.split()}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"^packages = \[(.+)\]$", project, flags=re.MULTILINE)

    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert packages is not None
    assert set(re.findall(r'"(\w+)"', packages[1])) <= copied
    assert {"pyproject.toml", "README.md", "LICENSE"} <= copied


@pytest.mark.parametrize("release", sorted(JETPACK_WHEELS))
def test_image_guide_and_doctor_name_the_same_wheels(release: str) -> None:
    """Where torch for a JetPack comes from is one address."""
    index = JETPACK_WHEELS[release]

    assert f"ARG TORCH_INDEX={index}\n" in text(f"Dockerfile.jetpack{release}")
    assert index in text("README.md")


def test_extras_exist() -> None:
    """What guide and images tell pip to install is an extra of ours."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r"'\.\[(\w+)\]'|^ARG EXTRA=(\w+)$", text("README.md"), flags=re.MULTILINE)
    named += re.findall(
        r'"\.\[(\w+)\]"|^ARG EXTRA=(\w+)$', "".join(map(text, IMAGES)), re.MULTILINE
    )

    extras = {one or other for one, other in named}

    # onnxruntime-training has no wheels for the boards' processors.
    assert extras == {"onnx", "torch"}
    assert extras < {extra_of(b.install) for b in BACKENDS.values()}
    assert all(re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) for extra in extras)


def extra_of(command: str) -> str:
    """Return `onnx` of `pip install 'edgesplit[onnx]'`."""
    return command.partition("[")[2].partition("]")[0]

"""What the real libraries have of a run that crashed and went on, read back with their readers."""

from __future__ import annotations

import csv
import json
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coordinator.config.run import ServeConfig
from coordinator.config.tracking import TrackingConfig
from coordinator.lab.centralised.run import resume_pooled, serve_pooled
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import StepDone
from coordinator.results.events.run import RunFinished
from coordinator.results.lifecycle import METRICS, TRACKERS
from coordinator.results.run_folder import RunFolder
from coordinator.tracking import to_prometheus
from coordinator.tracking.names import RUN_NUMBERS, TrackedRun
from coordinator.tracking.reporting import facts_of
from coordinator.tracking.to_prometheus import PrometheusPage, metric_name
from edge_sdk.deadline import Deadline
from edge_sdk.errors import ConfigError
from tests.coordinator.lab.centralised.centralised_runs import make_config, shard_files
from tests.e2e.cluster import Crash, save_model
from tests.e2e.programs import free_port

# PEFT asks transformers for a property that has another name now; mlflow and wandb have their own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EVERYWHERE = ("tensorboard", "wandb", "mlflow", "prometheus", "csv")
LIVE = "prometheus"
"""Takes the newest numbers alone, and has nothing to go on from."""
Points = dict[str, list[tuple[int, float]]]
"""By name, in the order of steps."""


class Told(NamedTuple):
    """A run that was reported everywhere."""

    folder: RunFolder
    metrics: str
    """The page at `/metrics` at the end of the run."""


class Watching:
    """Crashes in the middle of round 2, the first time; reads `/metrics` before the end."""

    def __init__(self, port: int, crashes_in: Path | None = None) -> None:
        self.port, self.crashes_in, self.metrics = port, crashes_in, ""

    def see(self, event: RunEvent) -> None:
        """Crash, or ask for the page until it is up to date."""
        if self.crashes_in and isinstance(event, StepDone) and event.report.stamp.step == 4:
            self.wait_for_trackers(self.crashes_in)
            raise Crash
        if isinstance(event, RunFinished):
            deadline = Deadline.after(60.0)
            while 'edgesplit_train_global_step{run="run"} 6.0' not in self.metrics:
                assert deadline.left_s(), self.metrics
                self.metrics = read(self.port)

    def wait_for_trackers(self, folder: Path) -> None:
        """Crash no sooner than the slowest library has begun: else there is nothing to go on."""
        deadline = Deadline.after(120.0)
        while not all((folder / f"{name}.json").exists() for name in EVERYWHERE if name != LIVE):
            assert deadline.left_s()
            time.sleep(0.05)


def read(port: int, path: str = "/metrics", **headers: str) -> str:
    """Return the page."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10.0) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        with error:
            return str(error.code)
    except OSError:
        return ""


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Libraries that ask nobody, and write to folders."""
    wanted = {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Told:
    """A run of six steps on pooled data that crashed after four, and went on."""
    folder = tmp_path_factory.mktemp("told")
    model = save_model("llama", folder / "model")
    port = free_port()
    plain = make_config(model, folder)
    config = replace(
        plain,
        pooled=replace(plain.pooled, files=shard_files(folder)),
        report_to=EVERYWHERE,
        tracking=TrackingConfig(prometheus_address=f"127.0.0.1:{port}"),
    )
    with pytest.raises(Crash):
        serve_pooled(config, Watching(port, folder / "runs" / "run" / TRACKERS))
    watching = Watching(port)
    resume_pooled(folder / "runs" / "run", watching, [])
    return Told(RunFolder(folder / "runs" / "run"), watching.metrics)


def of_csv(folder: RunFolder) -> Points:
    """Read the table."""
    points: Points = defaultdict(list)
    with (folder.path / TRACKERS / "numbers.csv").open() as file:
        for row in csv.DictReader(file):
            name = f"device/{row['device']}/{row['name']}" if row["device"] else row["name"]
            points[name].append((int(row["step"]), float(row["value"])))
    return points


def of_tensorboard(folder: RunFolder) -> Points:
    """Read the event files of the run and of each device."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: Points = {}
    for path in (folder.path / TRACKERS / "tensorboard").iterdir():
        read_back: Any = EventAccumulator(str(path), size_guidance={"scalars": 0})
        read_back.Reload()
        for tag in read_back.Tags()["scalars"]:
            name = (
                tag if path.name == "run" else f"device/{path.name.removeprefix('device-')}/{tag}"
            )
            points[name] = [(e.step, e.value) for e in read_back.Scalars(tag)]
    return points


def logged(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format, after seven bytes."""
    at, block, record = 7, 32768, b""
    assert content[:4] == b":W&B"
    while at < len(content):
        if block - at % block < 7:  # the rest of a block in which no header has room
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def of_wandb(folder: RunFolder) -> Points:
    """Read the files that `wandb sync` would send, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = defaultdict(list)
    idents = set()
    for path in sorted((folder.path / TRACKERS / "wandb").glob("wandb/offline-run-*/*.wandb")):
        idents.add(path.stem)
        for data in logged(path.read_bytes()):
            record: Any = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
                for name, value in items.items():
                    points[name].append((items["train/global_step"], value))
    assert len(idents) == 1
    return points


def of_mlflow(folder: RunFolder) -> Points:
    """Ask MLflow for the history of every metric of the only run."""
    from mlflow import MlflowClient

    client: Any = MlflowClient((folder.path.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("edgesplit")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.003"
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


@pytest.mark.parametrize("read_back", [of_csv, of_tensorboard, of_wandb, of_mlflow])
def test_every_step_is_there_once(told: Told, read_back: Callable[[RunFolder], Points]) -> None:
    """The crash and the resume leave each point once, with the value that the run's files have."""
    rows = told.folder.rows(METRICS)

    points = read_back(told.folder)

    assert sorted(s for s, _ in points["device/pooled/train/loss"]) == [1, 2, 3, 4, 5, 6]
    for name, key in (("train/loss", "train_loss"), ("eval/loss", None)):
        own = [(r["step"], r["eval"]["loss"] if key is None else r.get(key)) for r in rows]
        wanted = [(step, pytest.approx(value)) for step, value in own if value is not None]
        assert sorted(points[name]) == wanted
    assert {"eval/perplexity", "train/learning_rate", "train/samples"} <= points.keys()


def test_the_page_is_what_prometheus_reads(told: Told) -> None:
    """Its own parser finds the last row's numbers and each device's, labelled, over real HTTP."""
    from prometheus_client.parser import text_string_to_metric_families

    row = told.folder.rows(METRICS)[-1]

    families = {f.name: f for f in text_string_to_metric_families(told.metrics)}

    (loss,) = families["edgesplit_eval_loss"].samples
    assert (loss.labels, loss.value) == ({"run": "run"}, pytest.approx(row["eval"]["loss"]))
    (step,) = families["edgesplit_device_train_global_step"].samples
    assert (step.labels, step.value) == ({"run": "run", "device": "pooled"}, 6.0)
    (samples,) = families["edgesplit_train_samples"].samples
    assert (families["edgesplit_train_samples"].type, samples.name) == (
        "counter",
        "edgesplit_train_samples_total",
    )
    assert samples.value == 36.0


def test_nothing_of_this_machine_is_told(told: Told) -> None:
    """What trackers are told has no path, address, key or file; wandb sends nothing of its own."""
    config = make_config(told.folder.path.parents[1] / "model", told.folder.path.parents[1])

    facts = facts_of(config)

    texts = " ".join(map(str, facts.values()))
    assert facts["model"] == "model"
    assert "/" not in texts
    assert not {"listen", "secret_key", "allow_list", "runs"} & facts.keys()
    files = (told.folder.path / TRACKERS / "wandb").rglob("files/*")
    assert [path.name for path in files] == []


def open_page(folder: Path, **settings: Any) -> PrometheusPage:
    """A page of a run without numbers."""
    tracking = TrackingConfig(**settings)
    config = ServeConfig(model="m", report_to=("prometheus",), tracking=tracking)
    page = PrometheusPage()
    page.open(TrackedRun(name="r", folder=folder, facts={"model": "m"}, config=config))
    return page


def test_beyond_this_machine_only_with_the_token(tmp_path: Path) -> None:
    """Another address is refused without a token; whatever its file's mode, none reads without."""
    with pytest.raises(ValueError, match="others can reach .* with prometheus_token"):
        TrackingConfig(prometheus_address="0.0.0.0:9464")
    (tmp_path / "short").write_text("1234\n")
    (tmp_path / "token").write_text("correct-horse-battery\n")
    (tmp_path / "token").chmod(0o644)  # as a container's other user needs it
    with pytest.raises(ConfigError, match="at least 16 characters, got 4"):
        to_prometheus.read_token(tmp_path / "short")
    page = open_page(tmp_path, prometheus_address="0.0.0.0:0", prometheus_token=tmp_path / "token")

    port = page.address[1]
    answers = [
        read(port),
        read(port, Authorization="Bearer correct-horse-batteri"),
        read(port, "/other", Authorization="Bearer correct-horse-battery"),
        read(port, Authorization="Bearer correct-horse-battery"),
    ]
    page.close(completed=True)

    assert answers[:3] == ["401", "401", "404"]
    assert 'edgesplit_run_info{model="m",run="r"} 1.0' in answers[3]


def test_readers_that_say_nothing_are_bounded(tmp_path: Path) -> None:
    """However many connections are open, so many threads wait for them; the rest is shut out."""
    page = open_page(tmp_path, prometheus_address="127.0.0.1:0")
    before = threading.active_count()

    silent = [socket.create_connection(page.address, 10.0) for _ in range(40)]
    shut = b""
    for each in silent[to_prometheus.MOST_READERS :]:
        with suppress(ConnectionError):  # either is an end
            shut += each.recv(1)
    most = threading.active_count()
    for each in silent:
        each.close()
    page.close(completed=True)

    assert most - before <= to_prometheus.MOST_READERS
    assert shut == b""


def test_slow_readers_have_one_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then holds no place: question and answer together have so long."""
    monkeypatch.setattr(to_prometheus, "READER_S", 1.0)
    page = open_page(tmp_path, prometheus_address="127.0.0.1:0")
    slow = [socket.create_connection(page.address, 10.0) for _ in range(to_prometheus.MOST_READERS)]
    begun_s = time.monotonic()

    answer, refused = "", 0
    while not answer:
        assert time.monotonic() - begun_s < 10.0
        for each in slow:
            with suppress(OSError):  # it was shut
                each.send(b"G")
        time.sleep(0.2)
        answer = read(page.address[1])
        refused += not answer
    for each in slow:
        each.close()
    page.close(completed=True)

    assert refused >= 2, "they held every place for a while"
    assert "edgesplit_run_info" in answer


def test_one_address_holds_half_of_the_places(tmp_path: Path) -> None:
    """Another machine's silent connections leave room for a second one; this machine has all."""
    page = open_page(tmp_path, prometheus_address="127.0.0.1:0")
    has_room = page._server._has_room

    assert [has_room("192.0.2.1") for _ in range(5)] == [True] * 4 + [False]
    assert [has_room("127.0.0.1") for _ in range(5)] == [True] * 4 + [False]
    page.close(completed=True)


@pytest.mark.parametrize(
    ("host", "is_ours"), [("LOCALHOST:9464", True), ("[::1]:9464", True), ("evil.example", False)]
)
def test_without_a_token_only_our_own_names_lead_to_it(
    tmp_path: Path, host: str, is_ours: bool
) -> None:
    """A page of another site, whose name leads to this machine, reads nothing."""
    page = open_page(tmp_path, prometheus_address="127.0.0.1:0")

    answer = read(page.address[1], Host=host)
    page.close(completed=True)

    assert ("edgesplit_run_info" in answer) == is_ours
    assert is_ours or answer == "421"


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    """The address is named."""
    page = open_page(tmp_path, prometheus_address="127.0.0.1:0")
    port = page.address[1]

    with pytest.raises(ConfigError, match=f"prometheus_address: 127.0.0.1:{port}: Address already"):
        open_page(tmp_path, prometheus_address=f"127.0.0.1:{port}")

    page.close(completed=True)


@pytest.mark.parametrize("address", ["9464", "127.0.0.1", "127.0.0.1:99999", "tcp://a:1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    """What is no HOST:PORT is named."""
    with pytest.raises(ValueError, match="prometheus_address must be HOST:PORT"):
        TrackingConfig(prometheus_address=address)


@pytest.mark.parametrize(
    "address",
    [
        "https://me:secret@host/mlflow",
        "https://me:sec/ret@host/mlflow",
        "https://me:sec?r#et@host",
        "https://me:sec@ret@host",
        "https://[me:secret@host",
        "//me:secret@host",
        "postgresql://me:secret@host/db",
        "file://me:secret@host/mlruns",
        "https:/me:secret@host",
        "ht tps://me:secret@host",
        "https:\t//me:secret@host",
    ],
)
def test_a_password_has_no_place_in_a_config(address: str) -> None:
    """It would stand in the run's files; the message says where it goes instead, and not it."""
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        TrackingConfig(mlflow_uri=address)

    assert "sec" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["https://host:5000/mlflow", "file:///data/me@work", "sqlite:////data/me@work.db", "me@work"],
)
def test_paths_may_hold_an_at(address: str) -> None:
    """A folder of this machine is no password."""
    assert TrackingConfig(mlflow_uri=address).mlflow_uri == address


def test_names_are_those_of_prometheus() -> None:
    """Letters and underscores, our name before them."""
    names = [metric_name(name, of_device=False) for name in RUN_NUMBERS]

    assert all(name.startswith("edgesplit_") and name.isidentifier() for name in names)

"""Damaged files, full disks and late returns: when, what has happened, what must hold."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coordinator.results.events.event import RunEvent
from coordinator.results.events.run import AlreadyComplete, Exported, Listening, RunFinished
from coordinator.results.history import RunHistory
from coordinator.results.run_folder import CONFIG, RunFolder
from coordinator.rounds import launch
from edge_sdk.client.client import EdgeClient
from edge_sdk.config.describe import dump_config
from edge_sdk.deadline import Deadline
from edge_sdk.protocol.messages import StepReport
from tests.damage import DAMAGES
from tests.e2e.cluster import (
    Cluster,
    Crash,
    DieAt,
    Died,
    Serving,
    Trap,
    held_out,
    sentences,
    wait_all,
)
from tests.e2e.programs import PATIENCE_S, Program, Start
from tests.e2e.test_resume import Whole, complete, config_of, same

# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: Path) -> Whole:
    """The run that nothing has disturbed."""
    cluster = Cluster(tmp_path_factory.mktemp("whole"), llama, parts)
    return complete(cluster, config_of(cluster))


# ---- checkpoints of the coordinator ----

# All files and damages: tests/coordinator/results/test_damaged_checkpoints.py.
FILES = {"engine.safetensors": "a bit in the middle", "manifest.json": "missing"}


@pytest.mark.parametrize(("name", "damage"), FILES.items(), ids=FILES.keys())
def test_an_older_checkpoint_leads_to_the_same_bits(
    cluster: Cluster, whole: Whole, name: str, damage: str
) -> None:
    """Stopped at step 4, whose checkpoint is damaged: everybody goes back to step 3."""
    config = config_of(cluster)
    stopped = cluster.serve(config).stop_at(4).start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"
    newest = stopped.folder.checkpoints()[-1]
    DAMAGES[damage](newest / name)

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, whole)
    (note,) = [note for note in resumed.trap.notes if "damaged" in note]
    assert note.startswith(f"{newest.name}: damaged: ")
    assert note.endswith(f"set aside as damaged-{newest.name}, going on from checkpoint-000003")
    assert [e["checkpoint"] for e in resumed.events if e["event"] == "checkpoint.damaged"] == [
        newest.name
    ]
    assert (resumed.folder.path / f"damaged-{newest.name}").is_dir()


def test_a_round_that_starts_again_goes_back_to_an_older_checkpoint(
    cluster: Cluster, whole: Whole
) -> None:
    """In the running process: the last round is run again, too, and its row is written once."""
    config = config_of(cluster)
    trap = Trap()
    serving = cluster.serve(config, trap=trap).start()

    def damage(device: str, report: StepReport) -> None:
        if (device, report.stamp.step) == ("a", 3):
            trap.on_step = lambda _device, _report: None
            DAMAGES["a bit in the middle"](serving.folder.checkpoints()[-1] / "engine.safetensors")

    trap.on_step = damage
    staying = cluster.start("a", "c", data=held_out())
    dying = cluster.client("b", sentences(ord("b")), DieAt(4), data=held_out()).start()
    with pytest.raises(Died):
        dying.wait()
    back = cluster.start("b", data=held_out())

    assert serving.wait() == "completed"

    wait_all([*staying, *back])
    assert any("checkpoint-000003: damaged" in note for note in trap.notes)
    same(serving, whole)


# ---- checkpoints of a device ----


def device_files(cluster: Cluster, name: str) -> list[Path]:
    """What a device keeps of its rounds, oldest first."""
    return sorted((cluster.folder / "state" / "run-1" / name).glob("step-*.safetensors"))


def another_plan(path: Path) -> None:
    """Put a whole checkpoint of another device, which runs another plan, in its place."""
    other = next((path.parent.parent / "c").glob(f"{path.name[:11]}-*"))
    shutil.copyfile(other, path)


@pytest.mark.parametrize("damage", ["a bit in the middle", "another plan"])
def test_a_device_with_a_damaged_checkpoint_takes_part_all_the_same(
    cluster: Cluster, damage: str
) -> None:
    """It counts as not held: the coordinator sends everything, and nobody else notices."""
    config = config_of(cluster)
    stopped = cluster.serve(config).stop_at(4).start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"
    for client in clients:
        client.stop()
    wait_all(clients)
    newest = device_files(cluster, "b")[-1]
    (another_plan if damage == "another plan" else DAMAGES[damage])(newest)

    resumed = cluster.serve(config).start()
    clients = cluster.start(data=held_out())

    assert resumed.wait() == "completed"
    wait_all(clients)
    assert [row["round"] for row in resumed.rows] == [0, 1, 2]
    # b trained only the last step of the second round: its 6 samples count once.
    assert resumed.rows[2]["samples"] == 3 * 4 + 1 * 6 + 3 * 4
    assert (newest.parent / f"damaged-{newest.name}").is_file()


def test_a_checkpoint_that_is_damaged_after_it_was_offered(cluster: Cluster) -> None:
    """A device that is to go back and cannot says so, and gets everything."""
    config = config_of(cluster)
    serving = cluster.serve(config).start()
    staying = cluster.start("a", "c", data=held_out())
    dying = cluster.client("b", sentences(ord("b")), DieAt(4), data=held_out()).start()
    with pytest.raises(Died):
        dying.wait()
    newest = device_files(cluster, "a")[-1]
    DAMAGES["a bit in the middle"](newest)
    back = cluster.start("b", data=held_out())

    assert serving.wait() == "completed"

    wait_all([*staying, *back])
    assert [row["samples"] for row in serving.rows[1:]] == [42, 42]
    assert (newest.parent / f"damaged-{newest.name}").is_file()


# ---- the end ----


class Seen:
    """Keeps what it sees."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def see(self, event: RunEvent) -> None:
        """Keep it."""
        self.events.append(event)

    @property
    def kinds(self) -> list[type]:
        """What kinds of events it has seen."""
        return [type(event) for event in self.events]


def ended(cluster: Cluster, *, is_killed: bool) -> tuple[Serving, list[EdgeClient]]:
    """A run whose coordinator has ended, or was killed, before it wrote its adapter."""
    config = config_of(cluster)
    trap = Trap()

    def kill(row: dict[str, Any]) -> None:
        if row["round"] == 2:
            raise Crash

    if is_killed:
        trap.on_row = kill
    serving = cluster.serve(config, trap=trap)
    serving.folder.write_text(CONFIG, dump_config(config))
    serving.start()
    clients = cluster.start(data=held_out())
    assert serving.wait() == ("crashed" if is_killed else "completed")
    return serving, clients


@pytest.mark.parametrize("is_killed", [False, True], ids=["ended", "killed at its last row"])
def test_a_complete_run_needs_no_device(cluster: Cluster, whole: Whole, is_killed: bool) -> None:
    """Its last row stays whole; its adapter is written where it is missing or damaged, only.

    Devices that do not know of the end yet are told.
    """
    serving, clients = ended(cluster, is_killed=is_killed)
    path = serving.folder.path
    adapter = path / "adapter" / "adapter_model.safetensors"
    first, again, mended = Seen(), Seen(), Seen()

    assert launch.resume(path, first, [f"listen={cluster.address}"]) == "completed"
    wait_all(clients)
    written = adapter.read_bytes()
    assert launch.resume(path, again, []) == "completed"
    DAMAGES["a bit in the middle"](adapter)
    assert launch.resume(path, mended, []) == "completed"

    if is_killed:
        assert first.kinds == [AlreadyComplete, Listening, RunFinished, Exported]
    else:
        assert first.kinds == [AlreadyComplete, Exported]
    assert mended.kinds == [AlreadyComplete, Exported]
    assert again.kinds == [AlreadyComplete]
    assert adapter.read_bytes() == written
    assert serving.metrics == whole.metrics
    assert set(RunHistory(serving.folder).last_scores()) == {"file", "a", "b", "c"}


# ---- real programs ----


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait for something that programs do."""
    deadline = Deadline.after(PATIENCE_S)
    while not is_true():
        assert deadline.left_s() > 0
        time.sleep(0.02)


class Result(NamedTuple):
    """What a run has measured and learned."""

    metrics: bytes
    adapter: bytes


def result_of(files: Cluster, name: str) -> Result:
    """Read what the run of that name has left."""
    path = files.folder / "runs" / name
    adapter = path / "adapter" / "adapter_model.safetensors"
    return Result((path / "metrics.jsonl").read_bytes(), adapter.read_bytes())


SERVE = ("coordinator", "serve", "--config", "run.yaml")


def fill_disk(program: Program, num_bytes: int) -> None:
    """Let no file of a program grow beyond so many bytes: to it, the disk is full."""
    hard = resource.prlimit(program.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (num_bytes, hard))


def test_a_device_whose_disk_is_full_ends_with_9_and_comes_back(
    files: Cluster, start: Start
) -> None:
    """With the real commands: one line on both sides; started again, the result is the same."""
    coordinator = start(*SERVE)
    healthy, state = start_devices(start, "a")[0], files.folder / "edge-state"
    ill = start("edge-sdk", "run", "--config", "b.yaml")
    wait_until(lambda: bool(list(state.glob("run-*/b/step-000000-*"))))
    fill_disk(ill, 2048)

    assert ill.wait() == 9
    assert "File too large" in ill.lines[-1]
    again = start("edge-sdk", "run", "--config", "b.yaml")

    assert [program.wait() for program in (coordinator, healthy, again)] == [0, 0, 0]
    assert "b: left: StorageError: raised in edge_sdk." in coordinator.text
    undisturbed = start(*SERVE, "name=whole")
    devices = start_devices(start, "a", "b", state="whole")
    assert [program.wait() for program in (undisturbed, *devices)] == [0, 0, 0]
    assert result_of(files, "run") == result_of(files, "whole")


def start_devices(start: Start, *names: str, state: str = "edge-state") -> list[Program]:
    """Start devices of which each has its configuration."""
    return [start("edge-sdk", "run", "--config", f"{n}.yaml", f"state={state}") for n in names]


def test_full_disks_second_coordinators_and_returns_after_the_end(
    files: Cluster, start: Start
) -> None:
    """With the real commands: 9 and one line, then the same bits; 2 and one line; 0 at once."""
    path = files.folder / "runs" / "run"
    serve = SERVE
    full = start(*serve)
    wait_until((path / "checkpoint-000000").is_dir)
    second = start("coordinator", "resume", "runs/run", "listen=tcp://127.0.0.1:*")
    assert second.wait() == 2
    assert f"runs/run is in use by process {full.pid} since" in second.lines[-1]
    assert len(second.lines) == 1
    third = start(*serve)
    assert third.wait() == 2
    assert [line for line in third.lines[:-1] if not line.startswith("reading model ")] == []
    fill_disk(full, 4096)
    devices = [start("edge-sdk", "run", "--config", f"{name}.yaml") for name in "ab"]
    assert full.wait() == 9
    assert "cannot write" in full.lines[-1]
    assert "File too large" in full.lines[-1]
    assert [p.name for p in path.glob("checkpoint-*")] == ["checkpoint-000000"]

    # The devices have waited; the run is that of a disk with room.
    resumed = start("coordinator", "resume", "runs/run")
    assert [program.wait() for program in (resumed, *devices)] == [0, 0, 0]
    found = result_of(files, "run")
    undisturbed = start(*serve, "name=whole")
    devices = [start("edge-sdk", "run", "--config", f"{n}.yaml", "state=state-whole") for n in "ab"]
    assert [program.wait() for program in (undisturbed, *devices)] == [0, 0, 0]
    assert found == result_of(files, "whole")

    # After the end: nobody is waited for, and a name that is taken is told with what to do.
    again = start("coordinator", "resume", "runs/run")
    assert again.wait() == 0
    assert again.lines == ["run runs/run is complete; `rounds=N` with more of them goes on"]
    assert result_of(files, "run") == found
    for row in found.metrics.splitlines():
        assert set(json.loads(row)["eval_by_device"]) == {"a", "b"}
    late = start(*serve)
    assert late.wait() == 2
    assert "its run is complete: choose another name" in late.lines[-1]


def test_a_run_killed_before_its_first_checkpoint_is_taken_up(files: Cluster, start: Start) -> None:
    """Before its first checkpoint `serve` and `resume` both begin it from its start."""
    path = files.folder / "runs" / "run"
    for command in (("serve", "--config", "run.yaml"), ("resume", "runs/run")):
        killed = start("coordinator", "serve", "--config", "run.yaml")
        wait_until((path / "checkpoint-000000").is_dir)
        killed.kill()
        # What a kill a moment earlier would have left.
        os.rename(path / "checkpoint-000000", path / ".checkpoint-000000.tmp")
        coordinator = start("coordinator", *command)
        coordinator.wait_for("listening at")
        wait_until((path / "checkpoint-000000").is_dir)
        coordinator.interrupt()
        assert coordinator.wait() == 130
        assert RunFolder(path).load_checkpoint().state["round"] == 0
        shutil.rmtree(path)


@pytest.mark.parametrize("who", ["resume", "export", "status"])
def test_none_whole_or_a_later_version_is_one_line(files: Cluster, start: Start, who: str) -> None:
    """`resume` and `export` end with 9 and name each; `status` names it beside the rest."""
    path = files.folder / "runs" / "run"
    begun = start("coordinator", "serve", "--config", "run.yaml")
    wait_until((path / "checkpoint-000000").is_dir)
    begun.interrupt()
    begun.wait()
    DAMAGES["a bit in the middle"](path / "checkpoint-000000" / "ledger.safetensors")
    arguments = [who, "runs/run", *(["--to", "out"] if who == "export" else [])]

    damaged = start("coordinator", *arguments)

    assert damaged.wait() == (0 if who == "status" else 9)
    reason = "ledger.safetensors is not as it was written"
    if who == "status":
        assert f"checkpoint-000000 is damaged: {reason}" in damaged.lines
        return
    waits = ("importing torch", "reading model ")
    [line] = [each for each in damaged.lines if not each.startswith(waits)]
    assert f"checkpoint-000000 cannot be read: {reason}" in line
    about = json.loads((path / "env.json").read_text()) | {"format": 99, "edgesplit": "9.9.9"}
    (path / "env.json").write_text(json.dumps(about))
    later = start("coordinator", *arguments)
    assert later.wait() == 9
    assert len(later.lines) == 1
    assert "runs/run is of format 99, written by edgesplit 9.9.9" in later.lines[0]

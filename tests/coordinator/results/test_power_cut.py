"""Power that is cut at any moment costs at most what was done since the last checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.config.run import ServeConfig
from coordinator.results.lifecycle import METRICS, PLANS, TELEMETRY, new_folder, reopened
from coordinator.results.run_folder import CONFIG, Checkpoint, RunFolder
from edge_sdk.client.checkpoints import LocalState
from edge_sdk.errors import StorageError
from tests.power import watching

FILES = (METRICS, TELEMETRY, PLANS)


def checkpoint(step: int) -> Checkpoint:
    """A checkpoint of *step*."""
    arrays = {"w.A": np.full((4, 5), step, np.float32)}
    return Checkpoint({"step": step}, {"engine": arrays, "ledger": arrays})


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where what is left after a cut is looked at."""
    path = tmp_path / "left"
    path.mkdir()
    return path


class Promise:
    """What a run may not lose any more."""

    def __init__(self) -> None:
        self.steps: set[int | None] = {None}
        """Steps of the checkpoints from which it may go on; None: from its beginning."""

    def check(self, path: Path) -> None:
        """Resume what a cut has left: a whole checkpoint, exactly its rows, and it goes on."""
        run = RunFolder(path)
        try:
            found = run.load_checkpoint()
        except StorageError:
            assert None in self.steps, (path.name, [p.name for p in path.iterdir()])
            return
        assert not found.damaged, path.name
        step = found.state["step"]
        assert step in self.steps, path.name
        assert found.arrays["ledger"]["w.A"][0, 0] == step
        for name in FILES:
            run.drop_rows_from(name, step + 1)
            assert [row["round"] for row in run.rows(name)] == list(range(step + 1)), path.name
        run.append(METRICS, {"round": step + 1})
        run.save_checkpoint(90, checkpoint(90), keep=1)
        assert run.load_checkpoint().state["step"] == 90
        assert [path.name for path in run.checkpoints()] == ["checkpoint-000090"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_coordinator_loses_no_checkpoint_and_no_row(
    tmp_path: Path, scratch: Path, keep: int
) -> None:
    """Rounds with rows and checkpoints, one of them written twice: cut before every operation."""
    folder, promise = RunFolder.create(tmp_path, "run"), Promise()

    with watching(folder.path, promise.check, scratch) as disk:
        for step in (0, 1, 1, 2):
            for name in FILES:
                if len(folder.rows(name)) <= step:
                    folder.append(name, {"round": step})
            promise.steps.add(step)
            folder.save_checkpoint(step, checkpoint(step), keep)
            promise.steps = {step}

    assert disk.moments > 50


def test_a_coordinator_that_goes_back_loses_nothing(tmp_path: Path, scratch: Path) -> None:
    """Setting a damaged checkpoint aside, and dropping rows that come anew, may be cut, too."""
    folder, promise = RunFolder.create(tmp_path, "run"), Promise()
    for step in range(3):
        for name in FILES:
            folder.append(name, {"round": step})
        folder.save_checkpoint(step, checkpoint(step), keep=2)
    (folder.checkpoints()[-1] / "ledger.safetensors").write_bytes(b"")

    def check(path: Path) -> None:
        found = RunFolder(path).load_checkpoint()
        for damage in found.damaged:
            RunFolder(path).set_aside(damage.checkpoint)
        promise.check(path)

    promise.steps = {1}
    with watching(folder.path, check, scratch):
        found = folder.load_checkpoint()
        folder.set_aside(found.damaged[0].checkpoint)
        for name in FILES:
            folder.drop_rows_from(name, 2)
            folder.append(name, {"round": 2})
        promise.steps = {1, 2}
        folder.save_checkpoint(2, checkpoint(2), keep=2)
        promise.steps = {2}


def test_a_new_run_can_be_begun_or_taken_up_after_any_cut(tmp_path: Path, scratch: Path) -> None:
    """From the first folder to the first checkpoint: `resume`, or `serve` with the same name."""
    runs = tmp_path / "runs"
    runs.mkdir()
    config = ServeConfig(
        model="m", secret_key=tmp_path / "k", allow_list=tmp_path / "d", runs=runs, name="run"
    )
    resumed = []

    def check(path: Path) -> None:
        if (path / "run" / CONFIG).is_file():
            with reopened(path / "run", []) as run:
                resumed.append(run.checkpoint is not None)
                assert run.config == config
        else:
            with new_folder(replace(config, runs=path)) as folder:
                folder.save_checkpoint(0, checkpoint(0), keep=1)

    with watching(runs, check, scratch), new_folder(config) as folder:
        for name in FILES:
            folder.append(name, {"round": 0})
        folder.save_checkpoint(0, checkpoint(0), keep=1)

    assert set(resumed) == {False, True}


def test_a_device_loses_no_checkpoint(tmp_path: Path, scratch: Path) -> None:
    """What it has told that it holds, it holds after any cut, whole; so with its moments."""
    root = tmp_path / "state"
    root.mkdir()
    held: set[int] = set()
    ended: set[float] = set()

    def arrays(step: int) -> dict[str, np.ndarray]:
        return {"optimizer:w": np.full((3, 4), step, np.float32)}

    def check(path: Path) -> None:
        state = LocalState(path / "run-1" / "a", "plan")
        steps = state.steps()
        assert held <= set(steps), path.name
        assert all(state.load(step)["optimizer:w"][0, 0] == step for step in steps)
        if ended:
            assert state.moments(max(steps))["optimizer:w"][0, 0] in ended | set(steps)
        state.prepare()
        state.save(90, arrays(90))
        assert 90 in state.steps()
        assert not list(state.folder.glob("damaged-*")), path.name

    with watching(root, check, scratch) as disk:
        state = LocalState(root / "run-1" / "a", "plan")
        state.prepare()
        for step in (0, 3, 3, 6):
            held -= {step - 6}
            state.forget_after(step)
            state.save(step, arrays(step))
            held |= {step}
            state.save_moments(step + 3, arrays(step + 3))
            ended = {step + 3.0}

    assert disk.moments > 30

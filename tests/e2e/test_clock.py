"""The clock on the wall decides nothing: boards without a battery wake up in 1970."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster, Serving, Trap, wait_all

FIFTY_YEARS_S = 50 * 365.25 * 86_400.0


class Wall:
    """The clock on the wall of both sides; it jumps at every step of the run."""

    def __init__(self) -> None:
        self._offset_s, self.num_jumps = 0.0, 0
        self._right = time.time

    def __call__(self) -> float:
        """Return the time that the wall shows."""
        return self._right() + self._offset_s

    def jump(self) -> None:
        """Go fifty years ahead, then fifty years back, then to the right time."""
        self.num_jumps += 1
        self._offset_s = (0.0, FIFTY_YEARS_S, -FIFTY_YEARS_S)[self.num_jumps % 3]


def trained(cluster: Cluster, folder: str, wall: Wall | None = None) -> Serving:
    """A run of its own, from the download of the model's parts to the end."""
    parts = cluster.folder / folder / "parts"
    trap = Trap()
    if wall is not None:
        trap.on_step = lambda _device, _report: wall.jump()
    serving = cluster.serve(
        cluster.config(runs=cluster.folder / folder, patience_s=30.0), trap=trap
    ).start()
    state: Path = cluster.folder / folder / "state"
    wait_all(cluster.start(state=state, cache=parts))
    assert serving.wait() == "completed"
    cluster.address = "tcp://127.0.0.1:*"
    return serving


def test_a_run_does_not_mind_the_clock(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty years ahead and back in mid-run, on both sides: the same numbers, nobody is lost."""
    undisturbed = trained(cluster, "right")
    wall = Wall()
    monkeypatch.setattr(time, "time", wall)
    disturbed = trained(cluster, "wrong", wall)

    assert wall.num_jumps == 3 * 2 * 3
    assert disturbed.metrics == undisturbed.metrics
    assert not [note for note in disturbed.trap.notes if "left" in note]

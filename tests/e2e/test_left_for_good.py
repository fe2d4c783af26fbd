"""Devices that leave for good: a run ends with those who stay, or says how many it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import DevicesMissing
from tests.e2e.cluster import save_model
from tests.e2e.scheduled import ScheduledDevice
from tests.e2e.test_both_sides import EXAMPLES, FLOWS, KINDS, OTHERS, Kind, Step, World, go

LEFT = "left for good"
LEAVES = st.builds(Step, st.just("leave"), st.integers(0, 2))


class Emptier(World):
    """A world whose devices may leave for good; they are back only where the run asks for them."""

    said: tuple[int, list[str]] = (-1, [])
    """Round for which the run has said that it lacks devices, and those that were ready."""

    def _leave(self, device: ScheduledDevice, _amount: int) -> None:
        device.kill()
        device.words = LEFT

    def see(self, event: RunEvent) -> None:
        """Note that the run says how many devices it lacks."""
        if isinstance(event, DevicesMissing):
            assert len(event.ready) < event.least
            self.said = event.round, list(event.ready)
        super().see(event)

    def _next(self) -> list[Any]:
        state = self.coordinator.run.state
        num_alive = sum(device.is_alive for device in self.devices.values())
        is_said = self.said == (state.round, sorted(state.ready))
        if self.is_healed and is_said and num_alive < state.min_devices:
            for device in self.devices.values():
                if device.words == LEFT and not device.is_alive:
                    device.words = ""
                    device.start()
        return super()._next()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of three blocks; its parts are kept beside it."""
    return save_model("llama", tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=3)


@settings(max_examples=max(1, EXAMPLES // 4), suppress_health_check=[HealthCheck.too_slow])
@given(KINDS, st.lists(FLOWS | OTHERS | LEAVES, max_size=20), LEAVES, st.integers(0, 2**16))
def test_the_run_ends_or_says_whom_it_lacks(
    tiny: Path, kind: Kind, script: list[Step], leave: Step, seed: int
) -> None:
    """It ends by itself with enough devices; with too few it says so, and ends with those back."""
    go(kind, [*script, leave], seed, tiny, Emptier)

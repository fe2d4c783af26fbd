"""Whatever registered devices send, and whenever: the others learn the very same.

Every message in every state and phase, with extreme values of every field, in more than 20,000
cases; `benchmarks/fuzz.py` sends millions. What is sent is made in `siege.py`.
"""

from __future__ import annotations

import random
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.rounds.device_states import DeviceState
from edge_sdk.protocol.messages import FROM_DEVICE
from tests.coordinator.rounds.siege import FORMS, Outcome, besieged, drawn_case, run_under_siege
from tests.coordinator.rounds.test_any_message import assert_readable

# In each of the six kinds of run: together 21,600.
EXAMPLES, CASES = 12, 300
# Bytes that a device can make the coordinator keep for it: two stretches of parts, and the rest.
MOST_QUEUED_BYTES = 10 * 2**20
# Bytes that this process may grow by under siege.
MOST_GROWTH_BYTES = 200 * 2**20


def peak_bytes() -> int:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("form", FORMS)
def test_the_others_learn_the_same_to_the_last_bit(
    form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The run lives, honest devices are sent the same bits, and nothing piles up in memory."""
    served = besieged(form, tmp_path_factory.getbasetemp() / "siege")
    reference = run_under_siege(served, tmp_path_factory.mktemp("alone"), iter(()), 0)
    reached, sent, before = set[tuple[str, str]](), 0, peak_bytes()

    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate],  # no seed is simpler than another
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def besiege(seed: int) -> None:
        nonlocal sent
        for outcome in until_all_are_sent(served, seed):
            assert outcome.outcome == reference.outcome == "completed"
            assert outcome.learned == reference.learned
            assert not outcome.unforeseen
            assert outcome.most_queued_bytes <= MOST_QUEUED_BYTES
            assert all(text.isprintable() for text in outcome.told)
            reached.update(outcome.reached)
            sent += outcome.num_sent

    besiege()

    assert sent >= EXAMPLES * CASES
    assert peak_bytes() - before <= MOST_GROWTH_BYTES
    states = {state for kind, state in reached}
    assert {kind for kind, _ in reached} == {kind.__name__ for kind in FROM_DEVICE}
    expected = {"UNKNOWN TRAINING", "ASSIGNED TRAINING", "READY TRAINING", "MEMBER TRAINING"}
    assert states >= expected | (set() if "buffered" in form else {"MEMBER COLLECTING"})
    for kind in FROM_DEVICE:
        assert (kind.__name__, "MEMBER TRAINING") in reached


def until_all_are_sent(served: tuple[ServeConfig, ServerModel], seed: int) -> Iterator[Outcome]:
    """Begin runs until all cases are sent: a run ends when its honest devices are done."""
    draw, left = random.Random(seed), CASES
    cases = (drawn_case(draw.getrandbits(32)) for _ in range(CASES))
    while left > 0:
        with tempfile.TemporaryDirectory() as folder:
            outcome = run_under_siege(served, Path(folder), cases)
            assert_readable(outcome.folder)
        left -= outcome.num_sent
        yield outcome


def test_no_state_is_left_out() -> None:
    """The states that the test above looks for are all that a device can be in."""
    assert {state.name for state in DeviceState} == {
        *("UNKNOWN", "WELCOMED", "ASSIGNED", "READY", "MEMBER")
    }

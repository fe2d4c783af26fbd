"""What the coordinator makes of changes: whole states, a request to send again, or a refusal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.gateway.residuals import Residuals
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.held_states import HeldStates
from edge_sdk.protocol import residual
from edge_sdk.protocol.codecs import Array, as_read
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import Activation, Stamp

LIMIT = 10**6


def sent(held: HeldStates, drift: float = 0.0, step: int = 0) -> Envelope:
    """An Activation of two samples as it arrives, and what its device holds from now on."""
    draw = np.random.default_rng(0)
    base, move = (draw.standard_normal((2, 5, 64), np.float32) for _ in range(2))
    held.begin_step(step)
    tensors, starts = residual.code(base + np.float32(drift) * move, [5, 5], [0, 1], held)
    arrived: dict[str, Array] = {name: as_read(*tensor) for name, tensor in tensors.items()}
    arrived["lengths"] = np.array([5, 5], np.int32)
    message = Activation(
        stamp=Stamp(step=step), micro=0, num_micro=1, num_targets=1, samples=(0, 1), starts=starts
    )
    return Envelope(message, arrived)


def test_changes_become_whole_states_once() -> None:
    """What is read has no starts and no rest any more, so that reading it again changes nothing."""
    device, residuals = HeldStates(LIMIT), Residuals(LIMIT, None)

    for drift in (0.0, 0.1):
        whole = residuals.read("a", sent(device, drift), "residual")
        assert whole is not None
        again = residuals.read("a", whole, "residual")

        assert again is whole
        assert whole.message.starts == whole.message.samples == ()
        assert set(whole.tensors) == {"hidden", "lengths"}
        known = device.get(1)
        assert known is not None
        due = known.array_TD.astype(np.uint32) << 16
        np.testing.assert_array_equal(whole.tensors["hidden"][1], due.view(np.float32))


def test_devices_have_stores_of_their_own() -> None:
    """What one device has sent is no start for another, which is asked to send again."""
    device, residuals = HeldStates(LIMIT), Residuals(LIMIT, None)
    residuals.read("a", sent(device), "residual")
    changes = sent(device, 0.1)

    assert residuals.read("b", changes, "residual") is None
    assert residuals.read("a", changes, "residual") is not None


@pytest.mark.parametrize("codec", ["bfloat16", "int2"])
def test_changes_under_another_codec_are_refused(codec: Any) -> None:
    """A device that was not told to send changes fills no memory here."""
    residuals = Residuals(LIMIT, None)

    with pytest.raises(RemoteProtocolError, match=f"the codec is {codec}"):
        residuals.read("a", sent(HeldStates(LIMIT)), codec)


def test_a_device_fills_no_more_than_its_part() -> None:
    """However many samples a device names, what is held of it stays below the limit."""
    device, residuals = HeldStates(LIMIT), Residuals(2000, None)
    envelope = sent(device)
    lengths = np.array([5, 5], np.int32)
    for first in range(0, 200, 2):
        message = Activation(
            stamp=Stamp(),
            micro=0,
            num_micro=1,
            num_targets=1,
            samples=(first, first + 1),
            starts=(0, 0),
        )
        tensors = envelope.tensors | {"lengths": lengths}
        assert residuals.read("a", Envelope(message, tensors), "residual") is not None

    assert len(residuals.of("a")) == 1


def test_a_round_that_begins_again_and_a_new_process(tmp_path: Path) -> None:
    """Both find what was held at the last commit, less the step that was under way."""
    device, residuals = HeldStates(LIMIT), Residuals(LIMIT, tmp_path)
    residuals.begin_round(3)
    residuals.read("a", sent(device, 0.0, step=7), "residual")
    residuals.read("a", sent(device, 0.1, step=8), "residual")
    residuals.commit(8)()
    marks = [residuals.of("a").get(sample) for sample in (0, 1)]
    residuals.read("a", sent(HeldStates(LIMIT), 0.2, step=8), "residual")

    residuals.begin_round(3)
    again = [residuals.of("a").get(sample) for sample in (0, 1)]
    other = [Residuals(LIMIT, tmp_path).of("a").get(sample) for sample in (0, 1)]

    found = [[held.mark for held in side if held] for side in (marks, again, other)]
    assert found[0] == found[1] == found[2]

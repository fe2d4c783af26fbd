"""A codec with scales and a codec with a memory, each added by one line to the one table."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk.deadline import Deadline
from edge_sdk.protocol.codecs import CODECS, Array, Bytes, Codec, Memory
from edge_sdk.protocol.fragments import OutgoingMessage
from edge_sdk.protocol.messages import AdapterUpload, Stamp
from edge_sdk.transport.memory_link import memory_pair
from tests.edge_sdk.protocol.test_headers import through

UPLOAD = AdapterUpload(stamp=Stamp())


class ScaledRows(Codec):
    """int8 with one float32 scale for each row."""

    bytes_per_number = 1.0

    def group(self, shape: Any) -> int:
        """A row is one group."""
        return int(shape[-1])

    def num_bytes(self, shape: Any) -> int:
        """A byte for each number, four for each row."""
        return int(np.prod(shape[:-1])) * (4 + shape[-1])

    def encode_into(self, groups_GN: Array, out: Bytes) -> None:
        """Scale each row to -127 .. 127."""
        scales_G1 = np.abs(groups_GN).max(1, initial=1e-9, keepdims=True) / np.float32(127)
        rows = out.reshape(len(groups_GN), -1)
        rows[:, :4] = scales_G1.view(np.uint8)
        rows[:, 4:] = np.rint(groups_GN / scales_G1).astype(np.int8).view(np.uint8)

    def decode(self, buffer: Any, shape: Any, memory: Memory) -> Array:
        """Multiply by the scales."""
        rows = np.frombuffer(buffer, np.uint8).reshape(-1, 4 + shape[-1])
        scales_G1 = rows[:, :4].copy().view(np.float32)
        found: Array = rows[:, 4:].view(np.int8) * scales_G1
        return found


class Changes(Codec):
    """float16 of what has changed since the tensor before; what that loses is made up for later."""

    has_memory = True

    def prepare(self, array: Array, memory: Memory) -> Array:
        """Subtract what the other end has."""
        change: Array = array - memory.get("seen", np.float32(0))
        memory["seen"] = memory.get("seen", np.float32(0)) + change.astype("f2").astype("f4")
        return change

    def decode(self, buffer: Any, shape: Any, memory: Memory) -> Array:
        """Add to what was there."""
        change = super().decode(buffer, shape, memory).reshape(shape)
        memory["seen"] = memory.get("seen", np.float32(0)) + change
        return memory["seen"].copy()


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in the table for the time of a test."""
    monkeypatch.setitem(CODECS, "int8-rows", ScaledRows("int8-rows", "u1"))
    monkeypatch.setitem(CODECS, "changes", Changes("changes", "<f2"))


@given(
    shapes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 90)), min_size=1, max_size=4),
    chunk=st.integers(1, 300),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_groups_survive_any_cut(shapes: list[tuple[int, int]], chunk: int) -> None:
    """However the chunks cut the rows, each arrives with its scale, off by half a step at most."""
    draw = np.random.default_rng(0)
    arrays = {f"t{i}": draw.standard_normal(s, np.float32) for i, s in enumerate(shapes)}

    got = through(OutgoingMessage(UPLOAD, {n: (a, "int8-rows") for n, a in arrays.items()}, chunk))

    assert got is not None
    for name, array in arrays.items():
        steps = np.abs(array).max(1, initial=1e-9, keepdims=True) / 127
        assert got.tensors[name].shape == array.shape
        assert (np.abs(got.tensors[name] - array) <= 0.501 * steps).all()


def test_a_memory_follows_its_stream() -> None:
    """Both ends remember the same of each tensor, on either lane, and errors do not add up."""
    device, coordinator = memory_pair()
    draw = np.random.default_rng(0)
    small, large = draw.standard_normal(10, np.float32), draw.standard_normal(60_000, np.float32)

    for _ in range(6):
        device.send(UPLOAD, {"a": (small, "changes")})
        device.send(UPLOAD, {"a": (large, "changes"), "b": (small, "changes")})
    got = [coordinator.receive(Deadline.after(5.0)).tensors for _ in range(12)]

    assert np.abs(got[0]["a"] - small).max() > 1e-5  # one float16 is not enough
    for tensors, sent in ((got[-2], {"a": small}), (got[-1], {"a": large, "b": small})):
        for name, array in sent.items():
            np.testing.assert_allclose(tensors[name], array, rtol=1e-6, atol=1e-7)

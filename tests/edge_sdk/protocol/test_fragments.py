"""Tensors that many messages carry are encoded once, and are what each would have written."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.protocol.codecs import CODECS
from edge_sdk.protocol.fragments import OutgoingMessage, SharedTensors
from edge_sdk.protocol.messages import RoundStart, Stamp


def packets_of(message: OutgoingMessage) -> list[bytes]:
    """Return header and chunks of a message, as they are sent."""
    found = []
    for number in range(message.num_packets):
        size = message.packet_bytes(number) - (0 if number else len(message.head))
        chunk = np.full(size, 0xFF, np.uint8)
        message.write_chunk(number, chunk)
        found.append((b"" if number else message.head) + chunk.tobytes())
    return found


@pytest.mark.parametrize("chunk_bytes", [64, 192, 1024, 1 << 20])
def test_shared_tensors_are_written_as_those_of_one_message(chunk_bytes: int) -> None:
    """Whatever the codecs, the shapes and the size of a chunk, the bytes are the same."""
    rng = np.random.default_rng(0)
    shapes = [(3, 5), (), (0, 4), (7,), (2, 3, 40), (300,)]
    names = [codec.name for codec in CODECS.values() if not codec.has_memory]
    tensors = {
        f"{codec}.{number}": (rng.integers(0, 9, shape).astype(CODECS[codec].array), codec)
        for codec in names
        for number, shape in enumerate(shapes)
    }
    shared = SharedTensors(tensors)

    for step in range(2):
        message = RoundStart(stamp=Stamp(step=step), end_step=step + 1, is_full=False)
        alone = OutgoingMessage(message, tensors, chunk_bytes)
        together = OutgoingMessage(message, shared, chunk_bytes)
        assert packets_of(together) == packets_of(alone)


def test_a_codec_with_a_memory_of_each_peer_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes depends on what the peer has had, so that nobody may send it to two."""
    monkeypatch.setattr(CODECS["bfloat16"], "has_memory", True)

    with pytest.raises(AssertionError, match="memory"):
        OutgoingMessage(
            RoundStart(stamp=Stamp(), end_step=1, is_full=False),
            SharedTensors(x=(np.zeros((4, 4), np.float32), "bfloat16")),
        )

"""What a device fetches: each answer brings it forward, and nothing is fetched that has no room."""

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.client.config import ClientConfig
from edge_sdk.client.setup import RuntimeSetup
from edge_sdk.errors import DataError, RemoteProtocolError, StorageError
from edge_sdk.model.kept import part_cache
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import PartData, PartRequest, Stamp, Welcome
from edge_sdk.protocol.plan import Part

DATA = bytes(range(100))
PART = Part(name="block.0", sha256=hashlib.sha256(DATA).hexdigest(), num_bytes=len(DATA))


@pytest.fixture
def setup(tmp_path: Path) -> RuntimeSetup:
    """A device with an empty cache."""
    return RuntimeSetup(ClientConfig(coordinator="tcp://x:1", server_key="", cache=tmp_path), None)


class Answers:
    """A coordinator that answers with a stretch of some size."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.asked = sizes, 0

    def __call__(self, request: PartRequest) -> Envelope:
        """Return as many bytes as the next size says."""
        size = self.sizes[min(self.asked, len(self.sizes) - 1)]
        self.asked += 1
        data = (DATA * 3)[request.offset : request.offset + size]
        message = PartData(
            stamp=request.stamp, sha256=PART.sha256, offset=request.offset, total_bytes=len(DATA)
        )
        return Envelope(message, {"data": np.frombuffer(data, np.uint8)})


def test_a_part_is_fetched_in_whatever_stretches_come(setup: RuntimeSetup) -> None:
    """Stretches of any size that end where the part ends give its bytes."""
    path = setup.fetch(PART, Answers([1, 50, 49]), Stamp())

    assert path.read_bytes() == DATA


@pytest.mark.parametrize("sizes", [[0], [60, 0], [101], [60, 60]])
def test_each_answer_brings_a_download_forward(setup: RuntimeSetup, sizes: list[int]) -> None:
    """An answer without bytes, or with more than are missing, is refused: no loop, no full disk."""
    answers = Answers(sizes)
    with pytest.raises(RemoteProtocolError, match=r"part 'block.0': \d+ bytes came at \d+, of 100"):
        setup.fetch(PART, answers, Stamp())

    assert answers.asked == len(sizes)


def test_nothing_is_fetched_that_the_disk_cannot_hold(
    setup: RuntimeSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part larger than what is free is not asked for; the message says where and how much."""
    answers = Answers([50])
    usage: Any = type("Usage", (), {"free": part_cache.SPARE_BYTES + 99})
    monkeypatch.setattr(part_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"needs 100 bytes more in .*, where \d+ are free"):
        setup.fetch(PART, answers, Stamp())

    assert answers.asked == 0


def test_bad_data_is_known_before_anything_is_fetched(tmp_path: Path) -> None:
    """What is wrong with the private rows ends a device before it downloads or measures."""
    config = ClientConfig(coordinator="tcp://x:1", server_key="", cache=tmp_path)
    setup, answers = RuntimeSetup(config, [{"text": "a"}, {"txt": "b"}]), Answers([50])
    values: dict[str, Any] = {each.name: None for each in fields(Welcome)}
    welcome = Welcome(**{**values, "stamp": Stamp(), "files": PART, "training": {"seed": 0}})

    with pytest.raises(DataError, match="needs text"):
        setup.files(welcome, answers)

    assert answers.asked == 0

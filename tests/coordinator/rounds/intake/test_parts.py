"""Stretches of parts that devices fetch, of a whole coordinator and a gateway without sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.config.run import ServeConfig
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.interface import Event, Joined
from coordinator.results.run_folder import RunFolder
from coordinator.results.watchers import Watchers
from coordinator.rounds.intake.parts import MOST_ASKED, PART_DATA_BYTES
from coordinator.rounds.loop import Coordinator
from edge_sdk.protocol.messages import PROTOCOL_VERSION, Hello, PartRequest, Stamp
from tests.coordinator.rounds.siege import Pen, Puppet, arriving, besieged

HELLO = Hello(stamp=Stamp(), protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32",))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[ServeConfig, ServerModel]:
    """A run whose devices fetch parts."""
    return besieged("server-gathered", tmp_path_factory.mktemp("parts"))


class Shelf(Pen):
    """A gateway whose devices confirm nothing."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.received = device, 0
        self.woken = threading.Event()
        self.puppets[device] = Puppet(device, asked=True)

    def send(self, device: str, message: object, tensors: object = {}) -> None:
        """Count the parts that are sent, each as large as the largest."""
        super().send(device, message, tensors)  # type: ignore[arg-type]
        if type(message).__name__ == "PartData":
            self.received += 1
            self.queued_bytes[device] = self.received * PART_DATA_BYTES

    def wake(self) -> None:
        """Let the script go on."""
        self.woken.set()


def serve(served: tuple[ServeConfig, ServerModel], folder: Path, pen: Pen) -> Coordinator:
    """Serve what the script of *pen* does; reading has a thread of its own."""
    config, model = served
    run_folder = RunFolder.create(folder, "run")
    return Coordinator(config, model, run_folder, pen, Watchers(), "run-1")


def request(model: ServerModel) -> PartRequest:
    """The first stretch of a part."""
    return PartRequest(stamp=Stamp(), sha256=model.parts["front"].sha256, offset=0)


def test_a_device_that_confirms_nothing_has_two_parts_under_way(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path
) -> None:
    """400 requests and no confirmation: two are answered, two wait, and the fifth ends it."""
    pen = Shelf("m")
    coordinator = serve(served, tmp_path, pen)

    def script() -> Iterator[list[Event]]:
        yield [Joined("m", "1" * 32), arriving("m", HELLO, {})]
        for number in range(400):
            pen.woken.clear()
            yield [arriving("m", request(served[1]), {})] if "m" in pen.puppets else []
            if number < MOST_ASKED:
                assert pen.woken.wait(30.0)
        coordinator.stop()
        while True:
            yield []

    pen.script = script()
    assert coordinator.serve() == "paused"
    assert pen.received == 2
    assert "m" not in pen.puppets
    assert any(f"more than {MOST_ASKED} parts" in text for text in pen.told)


def test_parts_are_read_by_another_thread(
    served: tuple[ServeConfig, ServerModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's thread reads no file of a part, however long that would take."""
    pen = Shelf("m")
    coordinator = serve(served, tmp_path, pen)
    readers, read_part = list[int](), served[1].read_part

    def watched(*args: object) -> bytes:
        readers.append(threading.get_ident())
        return read_part(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(served[1], "read_part", watched)

    def script() -> Iterator[list[Event]]:
        yield [Joined("m", "1" * 32), arriving("m", HELLO, {})]
        yield [arriving("m", request(served[1]), {})]
        assert pen.woken.wait(30.0)
        coordinator.stop()
        while True:
            yield []

    pen.script = script()
    assert coordinator.serve() == "paused"
    assert readers
    assert threading.get_ident() not in readers

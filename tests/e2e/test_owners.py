"""Trouble of the coordinator's own ends its run, never a device; a device's ends its part alone."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings
from coordinator.engine.interface import Job
from coordinator.engine.local import LocalEngine
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundStarted
from edge_sdk.errors import ConfigError, EdgeError, LocalProtocolError, NumericError, StorageError
from edge_sdk.lora.adapters import Pair
from edge_sdk.protocol import headers
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.headers import TensorSpec
from edge_sdk.protocol.messages import AdapterUpload, Message, StepReport
from edge_sdk.transport.link import NO_TENSORS
from edge_sdk.transport.zmq_link import ZmqLink
from profiler.profile import DeviceProfile
from tests.e2e.cluster import PATIENCE_S, Cluster, Trap, wait_all

OURS: dict[str, Callable[[], Exception]] = {
    "full disk": lambda: StorageError("cannot write events.jsonl: No space left on device"),
    "descriptors": lambda: OSError(errno.EMFILE, "Too many open files"),
    "memory": lambda: MemoryError("out of memory"),
    "configuration": lambda: ConfigError("the coordinator is too small"),
    "a watcher": lambda: KeyError("a bug of the console"),
}


@pytest.mark.parametrize("case", OURS)
def test_trouble_of_our_own_blames_no_device(cluster: Cluster, case: str) -> None:
    """Whoever's message was in hand: the run ends with the error, devices wait and finish later."""
    made = OURS[case]()

    def fail(device: str, report: StepReport) -> None:
        if (device, report.stamp.step) == ("b", 1):
            raise made

    trap = Trap()
    trap.on_step = fail
    serving = cluster.serve(trap=trap).start()
    clients = cluster.start()

    with pytest.raises(type(made)) as raised:
        serving.wait()

    assert raised.value is made
    assert not any(client.wait(0.0) for client in clients)
    assert cluster.serve().start().wait() == "completed"
    wait_all(clients)


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("y"), LocalProtocolError("z")])
def test_an_error_that_nobody_foresaw_ends_one_part(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The device in whose part it was is not blamed: it joins again, and the run is completed."""
    serving = cluster.serve()
    stepped, raised = serving.planner.stepped, list[str]()

    def fail(device: str, num_tokens: int, compute_s: float) -> None:
        if device == "b" and not raised:
            raised.append(device)
            raise error
        stepped(device, num_tokens, compute_s)

    monkeypatch.setattr(serving.planner, "stepped", fail)
    serving.start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    assert raised == ["b"]
    [left] = [row for row in serving.events if row["event"] == "device.left"]
    assert left["device"] == "b"
    assert type(error).__name__ in left["reason"]


def test_one_that_always_fails_is_sent_away(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device may join again after errors that nobody foresaw, but not without end."""
    serving = cluster.serve(cluster.config(min_devices=2, rounds=100_000))
    stepped = serving.planner.stepped

    def fail(device: str, num_tokens: int, compute_s: float) -> None:
        if device == "c":
            raise KeyError("always")
        stepped(device, num_tokens, compute_s)

    monkeypatch.setattr(serving.planner, "stepped", fail)
    serving.state.wait_for({"a", "b", "c"})
    serving.start()
    *_, bad = cluster.start()

    with pytest.raises(EdgeError, match="coordinator failed at what it sent: KeyError") as raised:
        bad.wait(PATIENCE_S)
    assert raised.value.exit_code == 1
    serving.coordinator.stop()
    assert serving.wait() == "paused"


class Poison(Trap):
    """Spoils the coordinator's own adapters when the second round begins."""

    def __init__(self) -> None:
        super().__init__()
        self.spoil: Callable[[], None] = lambda: None

    def see(self, event: RunEvent) -> None:
        """Look for the round."""
        super().see(event)
        if isinstance(event, RoundStarted) and event.round == 1:
            self.spoil()


@pytest.mark.parametrize("number", [1e30, float("nan")])
def test_weights_of_our_own_blame_no_device(cluster: Cluster, number: float) -> None:
    """What comes of a spoilt model is not finite, whoever sent its input: the run ends."""
    trap = Poison()
    serving = cluster.serve(trap=trap)
    engine = serving.coordinator.learned.engine

    def spoil() -> None:
        pairs = engine.learned().pairs.items()
        spoilt = {n: Pair(p.a_RI, np.full_like(p.b_OR, number)) for n, p in pairs}
        engine.begin(spoilt)

    trap.spoil = spoil
    serving.start()
    clients = cluster.start()

    with pytest.raises(NumericError, match="the run has diverged"):
        serving.wait()

    assert not any(client.wait(0.0) for client in clients)
    assert cluster.serve().start().wait() == "completed"
    wait_all(clients)


@pytest.mark.parametrize("number", [10.0, 1e3, 3.3e38])
def test_one_upload_spoils_nobody_elses_run(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    """A device that trains as it should and uploads nonsense is named; the others never notice."""
    send = ZmqLink.send

    def sent(
        self: ZmqLink, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        if isinstance(message, AdapterUpload) and message.stamp.device == "b":
            full = {n: (np.full_like(array, number), c) for n, (array, c) in tensors.items()}
            send(self, message, full)
        else:
            send(self, message, tensors)

    monkeypatch.setattr(ZmqLink, "send", sent)
    serving = cluster.serve(cluster.config(min_devices=2))
    serving.state.wait_for({"a", "b", "c"})
    serving.start()
    clients = dict(zip("abc", cluster.start(), strict=True))

    with pytest.raises(NumericError, match="beyond all measure"):
        clients.pop("b").wait(PATIENCE_S)
    assert serving.wait() == "completed"
    wait_all(clients.values())
    assert all(row["train_loss"] < 10.0 for row in serving.rows[1:])


def test_a_coordinator_that_is_too_small_says_so_itself(cluster: Cluster) -> None:
    """Where no plan is possible with what all have, the run ends, and its devices wait."""
    planning = PlanningConfig(
        split="memory", ranks="uniform", server_memory_bytes=1e5, server_flops_per_s=1e9
    )
    default = DeviceSettings(batch_size=4, codec="float32")
    serving = cluster.serve(cluster.config(planning=planning, default=default)).start()
    profile = DeviceProfile(memory_bytes=20 * 2.0**20, overhead_bytes=0.0, flops_per_s=1e9)
    clients = cluster.start(profile=profile)

    with pytest.raises(ConfigError, match=r"planning\.server_memory_bytes"):
        serving.wait()

    assert not any(client.wait(0.0) for client in clients)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_the_device_whose_part_cannot_be_computed_is_found(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    """Where a wave of several devices fails, the one whose part fails alone as well joins anew."""
    run_blocks, raised = LocalEngine._run_blocks, list[int]()

    def fail(self: LocalEngine, jobs: Sequence[Job], *args: Any, **options: Any) -> Any:
        if any(job.device == "b" for job in jobs) and len(raised) < 2:  # in the wave, and alone
            raised.append(len(jobs))
            raise IndexError("nobody foresaw it")
        return run_blocks(self, jobs, *args, **options)

    monkeypatch.setattr(LocalEngine, "_run_blocks", fail)
    serving = cluster.serve(cluster.config(labels=labels)).start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    assert raised == [3, 1]
    [left] = [row for row in serving.events if row["event"] == "device.left"]
    assert (left["device"], "IndexError: nobody foresaw it" in left["reason"]) == ("b", True)


@pytest.mark.parametrize("kind", ["Welcome", "PlanAssigned", "RoundStart"])
def test_a_run_that_fits_no_message_blames_no_device(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A model with so many weights that a header cannot name them is a matter of the config."""
    serving = cluster.serve()
    encode = headers.encode_header

    def short(message: Any, tensors: tuple[TensorSpec, ...] = ()) -> bytes:
        if type(message).__name__ == kind:
            raise LocalProtocolError(f"header of {kind} takes 70000 bytes")
        return encode(message, tensors)

    monkeypatch.setattr(headers, "encode_header", short)
    serving.start()
    clients = cluster.start()

    with pytest.raises(ConfigError, match=r"fits no message: .*lora\.target_modules"):
        serving.wait()

    assert not any(client.wait(0.0) for client in clients)

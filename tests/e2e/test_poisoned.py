"""What a few devices upload hurts nobody else: they are left out, or the run goes back unharmed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.screening import Diverged
from coordinator.config.run import DeviceSettings
from coordinator.config.screening import ScreeningConfig
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundStarted
from coordinator.rounds.buffered.model import BufferedModel
from edge_sdk.errors import NumericError
from edge_sdk.lora.adapters import Pair
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import AdapterUpload, Message
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.transport.link import NO_TENSORS
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import PATIENCE_S, Cluster, Trap, wait_all

Change = Callable[[AdapterUpload, str, np.ndarray], np.ndarray]


def tamper(monkeypatch: pytest.MonkeyPatch, names: str, change: Change) -> None:
    """Let the devices called *names* train as they should, and upload something else."""
    send = ZmqLink.send

    def sent(
        self: ZmqLink, message: Message, tensors: Mapping[str, TensorOut] = NO_TENSORS
    ) -> None:
        if isinstance(message, AdapterUpload) and message.stamp.device in names:
            tensors = {n: (change(message, n, array), c) for n, (array, c) in tensors.items()}
        send(self, message, tensors)

    monkeypatch.setattr(ZmqLink, "send", sent)


def full(number: float) -> Change:
    """All numbers are one."""
    return lambda _message, _name, array: np.full_like(array, number)


def events(serving: Any, kind: str) -> list[dict[str, Any]]:
    """The lines of events.jsonl of one kind."""
    return [event for event in serving.events if event["event"] == kind]


RUNS: dict[str, dict[str, Any]] = {
    "exact": {},
    "svd": {"aggregation": "svd"},
    "fedavg": {"aggregation": "fedavg"},
    "zeropad": {"aggregation": "zeropad", "default": DeviceSettings(split="all", batch_size=4)},
    "buffered": {"round_mode": "buffered", "aggregation": "exact"},
}


@pytest.mark.parametrize("run", RUNS)
def test_an_upload_that_cannot_be_changes_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    """Of three devices one brings 30: it is named and leaves, the others' run ends in a result."""
    tamper(monkeypatch, "b", full(30.0))
    serving = cluster.serve(cluster.config(min_devices=2, **RUNS[run]))
    serving.state.wait_for({"a", "b", "c"})
    serving.start()
    clients = dict(zip("abc", cluster.start(), strict=True))

    with pytest.raises(NumericError, match="beyond all measure"):
        clients.pop("b").wait(PATIENCE_S)
    assert serving.wait() == "completed"
    wait_all(clients.values())
    left = [event["reason"] for event in events(serving, "device.left") if event["device"] == "b"]
    assert any("beyond all measure" in reason for reason in left)
    assert not serving.coordinator.learned.is_absurd()
    assert all(row["train_loss"] < 10.0 for row in serving.rows[1:])


def test_the_round_goes_on_without_what_is_left_out(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload unlike the others': its device is named, stays, and is in no row of samples."""

    def far(message: AdapterUpload, name: str, array: np.ndarray) -> np.ndarray:
        honest = message.stamp.round != 1 or not name.endswith(".B")
        return array if honest else array + np.float32(0.5)

    tamper(monkeypatch, "b", far)
    training = TrainingConfig(optimizer="sgd", learning_rate=0.1, max_grad_norm=0.0)
    serving = cluster.serve(cluster.config(training=training, rounds=3))
    serving.start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    (refused,) = events(serving, "upload.refused")
    assert (refused["device"], refused["round"]) == ("b", 1)
    assert [row.get("refused") for row in serving.rows[1:]] == [None, ["b"], None]
    assert [row["samples"] for row in serving.rows[1:]] == [36, 24, 36]


def test_several_at_once_are_nobodys_fault(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three bring NaN once: the run goes back, tries again, and nobody is expelled."""

    def spoilt(message: AdapterUpload, _name: str, array: np.ndarray) -> np.ndarray:
        return np.full_like(array, np.nan) if message.stamp.attempt == 2 else array

    tamper(monkeypatch, "bc", spoilt)
    serving = cluster.serve(cluster.config(rounds=4, min_devices=1))
    serving.state.wait_for({"a", "b", "c"})
    serving.start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    (rewound,) = events(serving, "run.rewound")
    assert "several devices at once" in rewound["reason"]
    assert not events(serving, "device.left")
    assert [row["samples"] for row in serving.rows[1:]] == [36, 36, 36, 36]


def test_krum_leaves_a_plausible_enemy_out(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of five goes the other way, no further than it could: the rows name it, it stays."""

    def turned(_message: AdapterUpload, name: str, array: np.ndarray) -> np.ndarray:
        return -array if name.endswith(".B") else array

    cluster.register("d", "e")
    tamper(monkeypatch, "d", turned)
    screening = ScreeningConfig(method="krum", hostile=1)
    serving = cluster.serve(cluster.config(min_devices=5, rounds=1, screening=screening)).start()
    clients = cluster.start(*"abcde")

    assert serving.wait() == "completed"
    wait_all(clients)
    assert serving.rows[1]["left_out"] == ["d"]
    assert "refused" not in serving.rows[1]


class Poison(Trap):
    """Spoils the coordinator's own adapters once, as a round begins."""

    def __init__(self) -> None:
        super().__init__()
        self.spoil: Callable[[], None] | None = None

    def see(self, event: RunEvent) -> None:
        """Look for the round."""
        super().see(event)
        if isinstance(event, RoundStarted) and event.round == 1 and self.spoil:
            spoil, self.spoil = self.spoil, None
            spoil()


@pytest.mark.parametrize("number", [1e6, 1e30, float("nan")])
@pytest.mark.parametrize("labels", ["server", "device"])
def test_weights_of_our_own_go_back(cluster: Cluster, number: float, labels: str) -> None:
    """What the coordinator itself holds is spoilt: the last good state is back, without blame."""
    trap = Poison()
    serving = cluster.serve(cluster.config(labels=labels), trap=trap)
    engine = serving.coordinator.learned.engine

    def spoil() -> None:
        pairs = engine.learned().pairs.items()
        engine.begin({n: Pair(p.a_RI, np.full_like(p.b_OR, number)) for n, p in pairs})

    trap.spoil = spoil
    serving.start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    assert not events(serving, "device.left")
    assert len(events(serving, "run.rewound")) == 1
    assert not serving.coordinator.learned.is_absurd()


def test_a_merge_goes_back(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a barrier, too: tours begin again from the last version, and the run completes."""
    merge, spoilt = BufferedModel.merge, [1]

    def merged(self: BufferedModel, version: int, **how: Any) -> Any:
        if version in spoilt:
            spoilt.remove(version)
            raise Diverged("nothing good comes of it")
        return merge(self, version, **how)

    monkeypatch.setattr(BufferedModel, "merge", merged)
    serving = cluster.serve(
        cluster.config(round_mode="buffered", aggregation="exact", rounds=3)
    ).start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    assert len(events(serving, "run.rewound")) == 1
    assert not events(serving, "device.left")
    assert [row["round"] for row in serving.rows] == [0, 1, 2, 3]


def test_high_rates_refuse_nobody(cluster: Cluster) -> None:
    """Rates far above what is sensible: the run completes with all devices, or diverges as one."""
    training = TrainingConfig(learning_rate=0.3, warmup_steps=2)
    serving = cluster.serve(
        cluster.config(training=training, rounds=3, screening=ScreeningConfig(factor=2.0))
    )
    serving.start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    assert not events(serving, "upload.refused")
    assert not events(serving, "device.left")

"""What a device says of itself is checked against what is here, and gains it nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.config.screening import ScreeningConfig
from edge_sdk.errors import RemoteProtocolError
from edge_sdk.lora.factors import norm
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import Activation, EvalReport, Message, StepReport, TopGradient
from edge_sdk.transport.link import NO_TENSORS
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import PATIENCE_S, Cluster, wait_all

Tensors = Mapping[str, TensorOut]
Change = Callable[[Any, Tensors], tuple[Message, Tensors]]


def say(monkeypatch: pytest.MonkeyPatch, name: str, kind: type, change: Change) -> None:
    """Let a device change all messages of *kind* that it sends."""
    send = ZmqLink.send

    def sent(self: ZmqLink, message: Message, tensors: Tensors = NO_TENSORS) -> None:
        if isinstance(message, kind) and message.stamp.device == name:
            message, tensors = change(message, tensors)
        send(self, message, tensors)

    monkeypatch.setattr(ZmqLink, "send", sent)


def one_target(message: Any, tensors: Tensors) -> tuple[Message, Tensors]:
    """One target is announced, whatever there is."""
    return replace(message, num_targets=1), tensors


def test_targets_that_the_coordinator_counts(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the labels here, one target instead of many ends the device's part at once."""
    say(monkeypatch, "b", Activation, one_target)
    serving = cluster.serve(cluster.config(min_devices=2))
    serving.state.wait_for({"a", "b", "c"})
    serving.start()
    clients = dict(zip("abc", cluster.start(), strict=True))

    with pytest.raises(RemoteProtocolError, match="num_targets"):
        clients.pop("b").wait(PATIENCE_S)
    assert serving.wait() == "completed"
    wait_all(clients.values())


def learned(cluster: Cluster, name: str, screening: ScreeningConfig) -> dict[str, np.ndarray]:
    """What a run with labels on the devices has learned in the coordinator's own blocks."""
    config = cluster.config(labels="device", rounds=1, name=name, screening=screening)
    serving = cluster.serve(config).start()
    clients = cluster.start()
    assert serving.wait() == "completed"
    wait_all(clients)
    ledger = serving.coordinator.learned.ledger
    own = ledger.pairs[""]
    assert all(norm(ledger.totals[weight]) > 0.0 for weight in own)
    return {weight: ledger.totals[weight].dense() for weight in own}


def moved(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """How far one of them is from the other, over its size."""
    squares = sum(float(((one[w] - other[w]) ** 2).sum()) for w in one)
    return float(np.sqrt(squares / sum(float((one[w] ** 2).sum()) for w in one)))


def test_targets_that_stay_on_the_device(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Honest gradients count as they are; a thousand times as large ones are scaled down."""
    honest = learned(cluster, "honest", ScreeningConfig())
    unbounded = learned(cluster, "off", ScreeningConfig(gradients=0.0))
    for weight in honest:
        np.testing.assert_array_equal(honest[weight], unbounded[weight])

    def louder(message: Any, tensors: Tensors) -> tuple[Message, Tensors]:
        return message, {n: (a * np.float32(1000), codec) for n, (a, codec) in tensors.items()}

    say(monkeypatch, "b", TopGradient, louder)
    alone = learned(cluster, "lies", ScreeningConfig(gradients=0.0))
    bounded = learned(cluster, "bounded", ScreeningConfig())

    assert moved(honest, bounded) < 0.8 * moved(honest, alone)


def test_a_report_of_another_step(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report with other targets than were announced ends the device's part."""
    say(monkeypatch, "b", StepReport, one_target)
    serving = cluster.serve(cluster.config(min_devices=2, labels="device"))
    serving.state.wait_for({"a", "b", "c"})
    serving.start()
    clients = dict(zip("abc", cluster.start(), strict=True))

    with pytest.raises(RemoteProtocolError, match="1 targets, the step was of"):
        clients.pop("b").wait(PATIENCE_S)
    assert serving.wait() == "completed"
    wait_all(clients.values())


def test_an_evaluation_counts_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second report, and one that nobody asked for, changes no row."""
    said: list[EvalReport] = []

    def again(self: ZmqLink, message: Message, tensors: Tensors = NO_TENSORS) -> None:
        send(self, message, tensors)
        if isinstance(message, EvalReport) and message.stamp.device == "b":
            said.append(message)
            lie = replace(message, loss_sum=1e6, num_targets=1000, num_correct=0)
            send(self, lie, {})
            send(self, replace(lie, stamp=replace(lie.stamp, round=99)), {})

    send = ZmqLink.send
    monkeypatch.setattr(ZmqLink, "send", again)
    serving = cluster.serve().start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)
    assert said
    scores = [row.get("eval_by_device", {}).get("b", {"loss": 0.0}) for row in serving.rows]
    assert all(score["loss"] < 100.0 for score in scores)

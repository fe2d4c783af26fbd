"""A device's own settings hold against a coordinator that asks for more, now or later in a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coordinator.rounds.admission import Admission
from edge_sdk.accept import Accept
from edge_sdk.errors import NotAccepted, RemoteProtocolError
from edge_sdk.protocol.messages import Activation, PlanAssigned, Welcome
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import Cluster, Trap, sentences, wait_all


def test_a_run_that_a_device_does_not_accept(cluster: Cluster) -> None:
    """It ends with exit code 4 and the coordinator shows its one line; the others go on."""
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    refused: dict[str, Any] = {
        "labels": Accept(labels="device"),
        "min_split": Accept(min_split="all"),
        "max_batch": Accept(max_batch=2),
        "max_part_bytes": Accept(max_part_bytes=100),
        "max_learning_rate": Accept(max_learning_rate=1e-6),
    }
    for name, accept in refused.items():
        with pytest.raises(NotAccepted, match=f"accepts only {name}: .*`accept.{name}`") as error:
            cluster.client("a", sentences(1), accept=accept).run()
        assert error.value.exit_code == 4
    clients = cluster.start("b", "c")

    assert serving.wait() == "completed"
    wait_all(clients)
    for name in refused:
        assert any(
            f"NotAccepted: this device accepts only {name}: " in n for n in serving.trap.notes
        )


def test_a_plan_in_the_middle_of_a_run_is_looked_at(cluster: Cluster) -> None:
    """A device that accepted a run leaves it when it is moved below its least split point."""
    trap = Trap()
    serving = cluster.serve(cluster.config(min_devices=2), trap=trap)

    def move(row: dict[str, Any]) -> None:
        if row["round"] == 0:
            plan = replace(serving.admission.plans["a"], split=1)
            parts = serving.model.parts_for(plan)
            stamp = serving.coordinator.run.stamp("a")
            serving.gateway.send("a", PlanAssigned(stamp=stamp, plan=plan, parts=parts))

    trap.on_row = move
    serving.start()
    client = cluster.client("a", sentences(1), accept=Accept(min_split=2)).start()
    others = cluster.start("b", "c")
    with pytest.raises(NotAccepted, match="min_split: 2, the plan has split 1"):
        client.wait(60.0)

    assert serving.wait() == "completed"
    wait_all(others)


def test_the_hash_of_a_model_is_computed_on_the_device(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that claims the expected hash must name parts that give it, and send these."""
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    honest, own = Admission._welcome, serving.model.hash

    def claims(admission: Admission, device: str) -> Welcome:
        return replace(honest(admission, device), model_hash="0" * 64)

    accept = Accept(model_hash="0" * 64)
    with monkeypatch.context() as patch:
        patch.setattr(Admission, "_welcome", claims)
        patch.setattr(serving.model, "hash", "0" * 64)
        with pytest.raises(RemoteProtocolError, match="not those of `model_hash`"):
            cluster.client("a", sentences(1), accept=accept).run()
        patch.setattr(serving.model, "hash", own)
    clients = [cluster.client("a", sentences(1), accept=Accept(model_hash=own)).start()]
    clients += cluster.start("b", "c")

    assert serving.wait() == "completed"
    wait_all(clients)


def test_with_all_blocks_no_hidden_state_leaves(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that accepts only all blocks sends no Activation, with labels kept here or not."""
    sent: list[type] = []
    send = ZmqLink.send

    def watched(link: ZmqLink, message: Any, *rest: Any) -> None:
        sent.append(type(message))
        send(link, message, *rest)

    monkeypatch.setattr(ZmqLink, "send", watched)
    settings = replace(cluster.config().default, split=5)
    serving = cluster.serve(cluster.config(default=settings, labels="device")).start()
    clients = cluster.start(accept=Accept(min_split="all", labels="device"))

    assert serving.wait() == "completed"
    wait_all(clients)
    assert Activation not in sent
    # Parts are in the cache where another test has asked for them.
    assert {kind.__name__ for kind in sent} - {"PartRequest"} == {
        *("Hello", "Ready", "StepReport", "AdapterUpload", "EvalReport"),
    }

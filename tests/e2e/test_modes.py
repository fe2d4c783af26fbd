"""Every way to run: who sees the labels, who holds which blocks, tasks, codecs, data, callbacks."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.config.run import Codec, DeviceSettings, EvaluationConfig
from edge_sdk.client.callbacks import Callback, RoundSummary
from edge_sdk.data.rows import DataConfig
from edge_sdk.protocol.codecs import CODECS
from edge_sdk.protocol.messages import StepReport
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import (
    Cluster,
    Serving,
    classified,
    held_out,
    sentences,
    wait_all,
    write_rows,
)
from tests.edge_sdk.protocol.test_codec_interface import ScaledRows
from tests.tiny import BLOCKS, CLASSES


def train(cluster: Cluster, **settings: Any) -> Serving:
    """Serve a run to its end."""
    serving = cluster.serve(cluster.config(**settings)).start()
    state = cluster.folder / f"state-{serving.folder.name}"
    clients = cluster.start(data=held_out(), state=state)
    assert serving.wait() == "completed"
    wait_all(clients)
    return serving


def learned(serving: Serving) -> dict[str, np.ndarray]:
    """The dense dW of every weight."""
    return {n: f.dense() for n, f in serving.ledger.global_factors().items()}


@pytest.mark.parametrize("splits", [(5, 5, 5), (1, 3, 5)], ids=["alone", "mixed"])
def test_who_sees_the_labels_changes_nothing(cluster: Cluster, splits: tuple[int, ...]) -> None:
    """Federated LoRA, alone and beside cut models, learns the same in both label modes."""
    devices = {n: DeviceSettings(split=k) for n, k in zip("abc", splits, strict=True)}
    found = {}
    for labels in ("server", "device"):
        serving = train(cluster, devices=devices, labels=labels, name=labels)
        found[labels] = learned(serving)
        assert serving.rows[-1]["train_loss"] < serving.rows[1]["train_loss"]
    assert found["server"].keys() == found["device"].keys()
    for name, value in found["server"].items():
        np.testing.assert_allclose(value, found["device"][name], atol=1e-4)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_classifier_learns(cluster: Cluster, bert: Path, labels: str) -> None:
    """String labels, a head that is trained in full: accuracy rises on file and on devices.

    One device lists the classes in another order, one lists none: both learn them by name.
    """
    cluster.model = bert
    names = tuple(sorted({row["label"] for row in classified(0, 99)}))
    orders = {"a": names, "b": names[::-1], "c": ()}
    data = {n: DataConfig(labels=order, validation_fraction=0.25) for n, order in orders.items()}
    shard = write_rows(cluster.folder / "dev.jsonl", classified(99, 40))
    config = cluster.config(
        task="sequence-classification",
        label_names=names,
        labels=labels,
        rounds=3,
        steps_per_round=8,
        devices={"a": DeviceSettings(split=1), "c": DeviceSettings(split=BLOCKS)},
        training=TrainingConfig(learning_rate=1e-2, lr_scheduler_type="constant"),
        evaluation=EvaluationConfig(data=DataConfig(path=str(shard), labels=names)),
    )
    serving = cluster.serve(config).start()
    clients = [cluster.client(n, classified(ord(n), 40), data=data[n]).start() for n in "abc"]

    assert serving.wait() == "completed"

    wait_all(clients)
    first, last = serving.rows[0], serving.rows[-1]
    assert len(names) == CLASSES
    assert last["eval"]["accuracy"] >= 0.9 > first["eval"]["accuracy"]
    assert all(score["accuracy"] >= 0.8 for score in last["eval_by_device"].values())


def test_micro_batches_change_nothing(cluster: Cluster) -> None:
    """Devices that send 1, 2 and 4 micro-batches a step learn what whole batches do.

    Also with several of them under way, wherever the labels are; and these differ in no bit.
    """
    found = {}
    for labels in ("server", "device"):
        for name, sizes, in_flight in (
            ("whole", (4, 4, 4), 1),
            ("micro", (4, 2, 1), 1),
            ("ahead", (4, 2, 1), 2),
            ("far", (4, 2, 1), 4),
        ):
            devices = {
                n: DeviceSettings(split=k, micro_batch=size, in_flight=in_flight)
                for n, k, size in zip("abc", (1, 2, 4), sizes, strict=True)
            }
            training = TrainingConfig(optimizer="sgd", learning_rate=0.5)
            label = f"{name}-{labels}"
            settings = {"devices": devices, "name": label, "labels": labels}
            found[label] = learned(train(cluster, training=training, **settings))
    for labels in ("server", "device"):
        for weight, value in found[f"micro-{labels}"].items():
            np.testing.assert_allclose(value, found["whole-server"][weight], atol=1e-5)
            for name in ("ahead", "far"):
                np.testing.assert_array_equal(value, found[f"{name}-{labels}"][weight])


def test_every_codec_trains(cluster: Cluster) -> None:
    """Devices with different codecs train together, close to what float32 gives."""
    codecs: tuple[Codec, ...] = ("bfloat16", "float16", "float32")
    coded = {n: DeviceSettings(codec=codec) for n, codec in zip("abc", codecs, strict=True)}

    found = train(cluster, devices=coded, name="coded").rows[-1]
    exact = train(cluster, name="exact").rows[-1]

    assert found["train_loss"] == pytest.approx(exact["train_loss"], rel=0.02)
    assert found["train_loss"] != exact["train_loss"]


def test_a_codec_that_one_line_adds_trains(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 with a scale for each row is offered, chosen and used, and stays close to float32."""
    monkeypatch.setitem(CODECS, "int8-rows", ScaledRows("int8-rows", "u1"))

    found = train(cluster, default=coded_as("int8-rows"), name="coded").rows[-1]
    exact = train(cluster, default=coded_as("float32"), name="exact").rows[-1]

    assert found["train_loss"] == pytest.approx(exact["train_loss"], rel=0.02)
    assert found["train_loss"] != exact["train_loss"]


def coded_as(codec: str) -> DeviceSettings:
    """Settings of all devices."""
    return DeviceSettings(split=2, batch_size=4, codec=codec)


def test_a_row_is_written_before_the_next_round_begins(cluster: Cluster) -> None:
    """Where no device evaluates, nothing is waited for: times of rows are times of rounds."""
    evaluation = EvaluationConfig(on_devices=False)
    serving = cluster.serve(cluster.config(evaluation=evaluation))
    seen: list[str] = []
    serving.trap.on_row = lambda row: seen.append(f"row {row['round']}")
    serving.trap.on_step = lambda _device, report: seen.append(f"round {report.stamp.round}")
    serving.start()
    wait_all(cluster.start(data=held_out()))

    assert serving.wait() == "completed"
    assert list(dict.fromkeys(seen)) == ["row 0", "round 0", "row 1", "round 1", "row 2"]


def test_evaluation_on_file_and_on_devices(cluster: Cluster) -> None:
    """Both are measured before the first round and as often as asked, and always at the end."""
    shard = write_rows(cluster.folder / "dev.jsonl", sentences(9, 6))
    evaluation = EvaluationConfig(data=DataConfig(path=str(shard)), every_rounds=2)

    rows = train(cluster, rounds=3, steps_per_round=1, evaluation=evaluation).rows

    assert [("eval" in row, "eval_by_device" in row) for row in rows] == [
        (True, True),
        (False, False),
        (True, True),
        (True, True),
    ]
    score = rows[0]["eval"]
    assert score["perplexity"] == pytest.approx(math.exp(score["loss"]))


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set of an application."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def test_data_of_every_kind(cluster: Cluster) -> None:
    """Text, pairs and chats, from memory, torch data sets and files with faults."""
    texts = sentences(1)
    pairs = [{"prompt": row["text"][:9], "completion": row["text"][9:] + "."} for row in texts]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["text"][:6]},
                {"role": "assistant", "content": row["text"][6:] + "."},
            ]
        }
        for row in texts
    ]
    dev = write_rows(cluster.folder / "dev.jsonl", [{}, {"text": "x" * 70}, *texts[:3]])
    data = DataConfig(path=str(dev), bad_rows="skip", too_long="drop")
    evaluation = EvaluationConfig(data=data)
    serving = cluster.serve(cluster.config(rounds=3, min_devices=3, evaluation=evaluation)).start()
    endless = [{"prompt": "x" * 70, "completion": "y"}]
    path = write_rows(cluster.folder / "b.jsonl", [{"prompt": "x"}, *pairs, *endless])
    for_b = DataConfig(path=str(path), bad_rows="skip", too_long="cut")
    clients = [
        cluster.client("a", Texts(texts)).start(),
        cluster.client("b", data=for_b).start(),
        cluster.client("c", iter(chats)).start(),
    ]

    assert serving.wait() == "completed"

    wait_all(clients)
    losses = [row["train_loss_by_device"] for row in serving.rows[1:]]
    assert all(losses[-1][name] < losses[0][name] for name in "abc")
    joined = [event for event in serving.events if event["event"] == "device.joined"]
    assert {event["device"]: event.get("left_out", 0) for event in joined} == {
        "a": 0,
        "b": 2,
        "c": 0,
    }


class Diary(Callback):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_connect(self, run: str) -> None:
        """The session has begun."""
        self.calls.append(f"connect {run}")

    def on_plan(self, plan: Plan) -> None:
        """The plan is known."""
        self.calls.append(f"plan {plan.split}")

    def on_step_end(self, report: StepReport) -> None:
        """A step is done."""
        self.calls.append(f"step {report.stamp.step}")

    def on_round_end(self, summary: RoundSummary) -> None:
        """A round is done."""
        self.calls.append(f"round {summary.round}")

    def on_disconnect(self, reason: str) -> None:
        """The session is lost."""
        self.calls.append("disconnect")

    def on_train_end(self, reason: str) -> None:
        """All is over."""
        self.calls.append(f"end: {reason}")


@pytest.fixture
def diary() -> Diary:
    """A callback that device a is given."""
    return Diary()


def test_callbacks_come_in_order(cluster: Cluster, diary: Diary) -> None:
    """An application hears of the session, the plan, every step and round, and the end."""
    serving = cluster.serve(cluster.config(min_devices=1, steps_per_round=2)).start()

    reason = cluster.client("a", sentences(1), diary).run()

    assert serving.wait() == "completed"
    assert reason == "the run is complete"
    assert diary.calls == [
        "connect run-1",
        "plan 2",
        "step 0",
        "step 1",
        "round 0",
        "step 2",
        "step 3",
        "round 1",
        "end: the run is complete",
    ]


def test_why_a_device_left_is_told_though_a_message_finds_it_gone(cluster: Cluster) -> None:
    """A message to a device that has just said goodbye is lost; its own reason is written down."""
    serving = cluster.serve(cluster.config(min_devices=2, rounds=500))
    leaving, other = cluster.start("a", "b")
    gateway, send = serving.gateway, serving.gateway.send

    def send_late(device: str, *words: Any) -> None:
        if device == "a" and serving.state.round == 1:
            leaving.stop()
            wait_all([leaving])
            while "a" in gateway.devices():
                time.sleep(0.01)
        send(device, *words)

    gateway.send = send_late  # type: ignore[method-assign]
    serving.start()
    wait_all([leaving])
    serving.coordinator.stop()

    assert serving.wait() == "paused"
    [left] = [event for event in serving.events if event["event"] == "device.left"]
    assert (left["device"], left["reason"]) == ("a", "stopped")
    other.stop()
    wait_all([other])


def test_start_stop_wait(cluster: Cluster, diary: Diary) -> None:
    """A client in the background stops when it is told to; the coordinator hears of it."""
    serving = cluster.serve(cluster.config(min_devices=2, rounds=500)).start()
    client = cluster.client("a", sentences(1), diary).start()
    other = cluster.start("b")
    while "round 0" not in diary.calls:
        assert not client.wait(0.02)

    client.stop()

    assert client.wait(10.0)
    assert diary.calls[-1] == "end: stopped"
    serving.coordinator.stop()
    assert serving.wait() == "paused"
    assert {"device": "a", "event": "device.left", "reason": "stopped"}.items() <= next(
        event for event in serving.events if event["event"] == "device.left"
    ).items()
    for each in other:
        each.stop()
    wait_all(other)

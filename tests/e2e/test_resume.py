"""A run that was stopped, killed or left goes on as if nothing had happened."""

from __future__ import annotations

import queue
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.steering.wishes import Wish
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.client import EdgeClient
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import PeerGone
from edge_sdk.protocol.messages import StepReport
from tests.e2e.cluster import (
    WORDS,
    Cluster,
    Serving,
    Trap,
    classified,
    held_out,
    sentences,
    wait_all,
    write_rows,
)
from tests.tiny import CLASSES

# As many classes as the model of these tests has.
LABELS = tuple(sorted(WORDS[:CLASSES]))
DEVICES = {
    "a": DeviceSettings(split=1, r=2),
    "b": DeviceSettings(split=3, batch_size=6, micro_batch=2),
    "c": DeviceSettings(split=4, r=3),
}


def config_of(cluster: Cluster, **settings: Any) -> ServeConfig:
    """Two rounds of three steps with AdamW, evaluated on a file and on the devices."""
    shard = write_rows(cluster.folder / "dev.jsonl", sentences(9, 6))
    evaluation = EvaluationConfig(data=DataConfig(path=str(shard)))
    return cluster.config(devices=DEVICES, evaluation=evaluation, **settings)


@pytest.fixture
def config(cluster: Cluster) -> ServeConfig:
    """A run to be disturbed."""
    return config_of(cluster)


class Whole(NamedTuple):
    """What a run without disturbance has measured and learned."""

    metrics: bytes
    ledger: dict[str, np.ndarray]


def complete(cluster: Cluster, config: ServeConfig, **settings: Any) -> Whole:
    """A run from beginning to end."""
    serving = cluster.serve(config).start()
    clients = cluster.start(data=held_out(), **settings)
    assert serving.wait() == "completed"
    wait_all(clients)
    assert len(serving.rows) == config.rounds + 1
    assert all(set(row["eval_by_device"]) == {"a", "b", "c"} for row in serving.rows)
    return whole_of(serving)


def whole_of(serving: Serving) -> Whole:
    """What a run has measured and learned."""
    return Whole(serving.metrics, serving.ledger.state())


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: Path) -> dict[str, Whole]:
    """The undisturbed run in both label modes."""
    found = {}
    for labels in ("server", "device"):
        cluster = Cluster(tmp_path_factory.mktemp(labels), llama, parts)
        found[labels] = complete(cluster, config_of(cluster, labels=labels))
    return found


def same(serving: Serving, expected: Whole) -> None:
    """Both have measured and learned the same, bit for bit."""
    found = whole_of(serving)
    assert found.metrics == expected.metrics
    assert found.ledger.keys() == expected.ledger.keys()
    for name, value in found.ledger.items():
        np.testing.assert_array_equal(value, expected.ledger[name], err_msg=name)


def test_one_seed_gives_the_same_bits_twice(
    cluster: Cluster, config: ServeConfig, wholes: dict[str, Whole]
) -> None:
    """Two runs with one seed write the same metrics.jsonl and learn the same factors."""
    found = complete(cluster, config)

    assert found.metrics == wholes["server"].metrics
    assert found.ledger.keys() == wholes["server"].ledger.keys()


STOPS = {
    "in a round": (4, "server"),
    "in a round, labels kept": (4, "device"),
    "before a round": (2, "device"),
    "at the end": (5, "server"),
}


@pytest.mark.parametrize(("step", "labels"), STOPS.values(), ids=STOPS.keys())
def test_a_stopped_run_goes_on_with_the_same_devices(
    cluster: Cluster, config: ServeConfig, wholes: dict[str, Whole], step: int, labels: Any
) -> None:
    """Ctrl-C anywhere, then resume: devices come back by themselves, and every bit is the same."""
    config = replace(config, labels=labels)
    stopped = cluster.serve(config).stop_at(step).start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, wholes[labels])


def delay_after_stop(serving: Serving, seconds: float) -> None:
    """Let what the coordinator sends after it was told to stop take its time, as on a busy one."""
    send, due = serving.gateway.send, queue.Queue[tuple[Any, ...]]()

    def deliver() -> None:
        while True:
            message = due.get()
            time.sleep(seconds)
            with suppress(PeerGone):
                send(*message)

    def send_late(*message: Any) -> None:
        if serving.coordinator._executor.wish:
            due.put(message)
        else:
            send(*message)

    serving.gateway.send = send_late  # type: ignore[method-assign]
    threading.Thread(target=deliver, daemon=True).start()


def test_a_stop_waits_for_what_it_has_handed_out(
    cluster: Cluster, config: ServeConfig, wholes: dict[str, Whole]
) -> None:
    """After the last round a coordinator leaves when devices hold its result: each bit is kept."""
    stopped = cluster.serve(config).stop_at(5)
    delay_after_stop(stopped, 0.3)
    stopped.start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, wholes["server"])


def asked_at(serving: Serving, step: int, wish: Wish) -> Serving:
    """Ask for something when device a has reported *step*."""

    def check(name: str, report: StepReport) -> None:
        if (name, report.stamp.step) == ("a", step):
            serving.coordinator.ask(wish)

    serving.trap.on_step = check
    return serving


WISHES = {
    "paused after a round": (Wish("pause", after_round=True), "paused", 3),
    "stopped after a round": (Wish("stop", after_round=True), "stopped", 3),
    "stopped in a round": (Wish("stop"), "stopped", 2),
}


@pytest.mark.parametrize(("wish", "outcome", "step"), WISHES.values(), ids=WISHES.keys())
def test_a_run_that_was_left_as_asked_goes_on(
    cluster: Cluster,
    config: ServeConfig,
    wholes: dict[str, Whole],
    wish: Wish,
    outcome: str,
    step: int,
) -> None:
    """Left after the round or the step, with a result or without, it can be resumed, to the bit.

    Devices of a run that is stopped hear of its end; those of a paused one come back.
    """
    left = asked_at(cluster.serve(config), 1, wish).start()
    clients = cluster.start(data=held_out())
    assert left.wait() == outcome
    assert left.state.step == step
    if outcome == "stopped":
        wait_all(clients)
        assert left.rows[-1]["round"] == step // 3

    resumed = cluster.serve(config).start()
    clients = clients if outcome == "paused" else cluster.start(data=held_out())

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, wholes["server"])


@pytest.mark.parametrize("splits", [(1, 5, 5), (5, 5, 5)], ids=["mixed", "alone"])
def test_a_stop_beside_devices_that_train_alone(
    cluster: Cluster, config: ServeConfig, splits: tuple[int, ...]
) -> None:
    """Who holds the whole model stops anywhere; the round is run again from its start, exactly."""
    devices = {n: DeviceSettings(split=k) for n, k in zip("abc", splits, strict=True)}
    config = replace(config, devices=devices, steps_per_round=12)
    state = cluster.folder / "state-whole"
    expected = complete(cluster, replace(config, name="whole"), state=state)
    stopped = cluster.serve(config).stop_at(15).start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, expected)


@pytest.mark.parametrize("step", [2, 4])
def test_a_stopped_run_goes_on_with_restarted_devices(
    cluster: Cluster, config: ServeConfig, wholes: dict[str, Whole], step: int
) -> None:
    """Both sides stopped and started again: the same bits, from the devices' own checkpoints."""
    stopped = cluster.serve(config).stop_at(step).start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"
    for client in clients:
        client.stop()
    wait_all(clients)

    resumed = cluster.serve(config).start()
    clients = cluster.start(data=held_out())

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, wholes["server"])


def test_a_complete_run_goes_on_with_more_rounds(cluster: Cluster, config: ServeConfig) -> None:
    """With `rounds=N` it ends where a run of N rounds does, to the bit under a constant rate."""
    training = replace(config.training, lr_scheduler_type="constant", warmup_steps=0)
    config = replace(config, training=training)
    state = cluster.folder / "state-whole"
    expected = complete(cluster, replace(config, name="whole"), state=state)
    complete(cluster, replace(config, rounds=config.rounds - 1))

    longer = cluster.serve(config).start()
    clients = cluster.start(data=held_out())

    assert longer.wait() == "completed"
    wait_all(clients)
    same(longer, expected)


def test_a_killed_coordinator_goes_on_from_its_last_round(
    cluster: Cluster, config: ServeConfig, wholes: dict[str, Whole]
) -> None:
    """Without a goodbye and without a checkpoint of its own the round is run again, to the bit."""
    killed = cluster.serve(config).crash_at(4).start()
    clients = cluster.start(data=held_out())
    assert killed.wait() == "crashed"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, wholes["server"])


def test_a_device_without_its_state_still_takes_part(cluster: Cluster, config: ServeConfig) -> None:
    """Who has lost its folder gets everything from the coordinator; the run completes."""
    stopped = cluster.serve(config).stop_at(4).start()
    clients = cluster.start(data=held_out())
    assert stopped.wait() == "paused"
    for client in clients:
        client.stop()
    wait_all(clients)
    shutil.rmtree(cluster.folder / "state" / "run-1" / "b")

    resumed = cluster.serve(config).start()
    clients = cluster.start(data=held_out())

    assert resumed.wait() == "completed"
    wait_all(clients)
    assert [row["round"] for row in resumed.rows] == [0, 1, 2]
    # b trained only the last step of the second round: its 6 samples count once.
    assert resumed.rows[2]["samples"] == 3 * 4 + 1 * 6 + 3 * 4


class LeaveAt(Callback):
    """Stops its device when that has finished *step*."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.client: EdgeClient | None = None

    def on_step_end(self, report: StepReport) -> None:
        """Stop it at the step."""
        if report.stamp.step == self._step:
            assert self.client is not None
            self.client.stop()


def leaving_at(step: int, cluster: Cluster, *args: Any, **settings: Any) -> EdgeClient:
    """A device that stops when it has finished *step*."""
    callback = LeaveAt(step)
    callback.client = cluster.client(*args, callback=callback, **settings)
    return callback.client


def test_a_round_goes_on_without_a_device_that_left(cluster: Cluster, config: ServeConfig) -> None:
    """With enough devices left, a departure in the middle of a round costs nothing but its part."""
    serving = cluster.serve(replace(config, min_devices=2)).start()
    staying = [cluster.client(n, sentences(ord(n))) for n in "ac"]
    leaving = leaving_at(1, cluster, "b", sentences(1))
    serving.state.wait_for({"a", "b", "c"})  # all three begin together
    clients = [client.start() for client in (*staying, leaving)]

    assert serving.wait() == "completed"

    wait_all(clients)
    assert [row["samples"] for row in serving.rows[1:]] == [24, 24]
    assert sum(event["event"] == "round.started" for event in serving.events) == 2


def test_a_round_starts_again_when_too_few_are_left(
    cluster: Cluster, config: ServeConfig, wholes: dict[str, Whole]
) -> None:
    """The round waits for the device to come back and then gives exactly what it would have."""
    trap = Trap()
    serving = cluster.serve(config, trap=trap).start()
    staying = cluster.start("a", "c", data=held_out())
    leaving = leaving_at(4, cluster, "b", sentences(ord("b")), data=held_out()).start()
    leaving.wait()
    back = cluster.start("b", data=held_out())

    assert serving.wait() == "completed"

    wait_all([*staying, *back])
    assert any("starts again" in note or "is saved at" in note for note in trap.notes)
    same(serving, wholes["server"])


def test_a_late_joiner_gets_the_whole_state(cluster: Cluster, config: ServeConfig) -> None:
    """A device that comes in the second round has all that the others have learned."""
    serving = cluster.serve(replace(config, min_devices=2, rounds=4))
    late: list[EdgeClient] = []

    def invite(row: dict[str, Any]) -> None:
        if row["round"] == 1:
            serving.state.wait_for({"c"})
            late.extend(cluster.start("c", data=held_out()))

    serving.trap.on_row = invite
    serving.start()
    clients = cluster.start("a", "b", data=held_out())

    assert serving.wait() == "completed"
    wait_all([*clients, *late])
    joined = next(row for row in serving.rows if "c" in row["eval_by_device"])
    # On its private shard it is as good as the global model: nobody's knowledge is missing.
    assert joined["eval_by_device"]["c"]["loss"] < serving.rows[0]["eval"]["loss"]


def test_a_classifiers_head_survives(cluster: Cluster, bert: Any) -> None:
    """A trained head is in the checkpoints of both sides."""
    cluster.model = bert
    config = cluster.config(
        task="sequence-classification",
        label_names=LABELS,
        labels="device",
        devices={"a": DeviceSettings(split=2), "b": DeviceSettings(split=5)},
    )
    data = DataConfig(labels=LABELS)

    def begin(state: str) -> list[EdgeClient]:
        folder = cluster.folder / state
        return [
            cluster.client(n, classified(ord(n)), data=data, state=folder).start() for n in "abc"
        ]

    whole = cluster.serve(replace(config, name="whole")).start()
    clients = begin("whole")
    whole.wait()
    wait_all(clients)
    stopped = cluster.serve(config).stop_at(4).start()
    clients = begin("state")
    assert stopped.wait() == "paused"

    resumed = cluster.serve(config).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    same(resumed, whole_of(whole))

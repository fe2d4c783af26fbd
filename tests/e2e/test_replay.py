"""Hidden states of frozen blocks are sent once: later epochs learn the same without them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config.replay import ReplayConfig
from coordinator.config.run import DeviceSettings
from coordinator.rounds.loop import KEPT_STATES
from edge_sdk.protocol.messages import Activation
from tests.e2e.cluster import Cluster, Serving, sentences, wait_all

ROWS, BATCH, EPOCHS = 24, 4, 3
STEPS = EPOCHS * ROWS // BATCH
AUTO = ReplayConfig(when="auto")


class Sent:
    """What a device sends of its samples, looked at where the coordinator takes it in."""

    def __init__(self, serving: Serving) -> None:
        self.rows = self.replayed = self.hidden_bytes = 0
        replays = serving.coordinator.run.replays
        whole = replays.whole

        def spy(device: str, envelope: Any) -> Any:
            message: Activation = envelope.message
            self.rows += len(envelope.tensors["lengths"])
            self.replayed += len(message.replays)
            if "hidden" in envelope.tensors:
                self.hidden_bytes += envelope.tensors["hidden"].nbytes
            return whole(device, envelope)

        replays.whole = spy  # type: ignore[method-assign]


def run(cluster: Cluster, *names: str, name: str, **settings: Any) -> tuple[Serving, Sent]:
    """Serve three epochs of devices whose blocks are frozen, to the end."""
    settings = {
        "rounds": EPOCHS,
        "steps_per_round": STEPS // EPOCHS,
        "min_devices": len(names),
        "default": DeviceSettings(split=2, batch_size=BATCH, micro_batch=1, r=0, codec="float32"),
        **settings,
    }
    rows = settings.pop("rows", None)
    serving = cluster.serve(cluster.config(name=name, **settings))
    sent = Sent(serving)
    serving.start()
    clients = [
        cluster.client(n, rows or sentences(ord(n), ROWS), state=cluster.folder / name).start()
        for n in names
    ]
    assert serving.wait() == "completed"
    wait_all(clients)
    return serving, sent


def learned(serving: Serving) -> dict[str, np.ndarray]:
    """What the run has come to, and what it found on the way."""
    pairs = serving.ledger.pairs[""]
    found = {f"{n}.A": p.a_RI for n, p in pairs.items()}
    found |= {f"{n}.B": p.b_OR for n, p in pairs.items()}
    return found | {"loss": np.array([row.get("train_loss", 0.0) for row in serving.rows])}


def assert_same(one: Serving, other: Serving) -> None:
    """Two runs have learned the same, bit for bit."""
    first, second = learned(one), learned(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
def test_three_epochs_are_the_same_to_the_bit(cluster: Cluster, codec: str) -> None:
    """What is kept as it came is what would have come again; two epochs of three send nothing."""
    default = DeviceSettings(split=2, batch_size=BATCH, micro_batch=1, r=0, codec=codec)
    plain, all_sent = run(cluster, "a", "b", name="plain", default=default)

    kept, sent = run(cluster, "a", "b", name="kept", default=default, replay=AUTO)

    assert_same(plain, kept)
    assert all_sent.replayed == 0
    assert sent.rows == all_sent.rows == 2 * EPOCHS * ROWS
    assert sent.replayed == 2 * (EPOCHS - 1) * ROWS
    assert sent.hidden_bytes < all_sent.hidden_bytes / (EPOCHS - 0.1)
    assert [row.get("replayed", 0) for row in kept.rows] == [0, 0, 2 * ROWS, 2 * ROWS]
    assert [row.get("samples") for row in kept.rows] == [row.get("samples") for row in plain.rows]
    assert not (kept.folder.path / KEPT_STATES).exists()


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_the_same_company_gives_the_same_bits(cluster: Cluster, codec: str) -> None:
    """Samples that are padded and computed together in each epoch too, four in a micro-batch."""
    rows = [{"text": "boat " * count} for count in (2, 3, 4, 5)]
    default = DeviceSettings(split=2, batch_size=4, r=0, codec=codec)
    settings = {"rows": rows, "default": default, "steps_per_round": 1}
    plain, _ = run(cluster, "a", name="plain", **settings)

    kept, sent = run(cluster, "a", name="kept", replay=AUTO, **settings)

    assert_same(plain, kept)
    assert sent.replayed == (EPOCHS - 1) * len(rows)


def test_other_company_moves_the_last_bits_alone(cluster: Cluster) -> None:
    """Products of other sizes round otherwise: what is learned is the same but for that."""
    default = DeviceSettings(split=2, batch_size=BATCH, r=0, codec="float32")
    plain, _ = run(cluster, "a", name="plain", default=default)

    kept, sent = run(cluster, "a", name="kept", default=default, replay=AUTO)

    assert sent.replayed == (EPOCHS - 1) * ROWS
    for name, value in learned(kept).items():
        np.testing.assert_allclose(value, learned(plain)[name], atol=2e-3)


@pytest.mark.parametrize(("when", "expected"), [("auto", 0), ("always", 2 * ROWS)])
def test_labels_on_the_device_need_a_word_more(cluster: Cluster, when: Any, expected: int) -> None:
    """With `labels: device` only `always` keeps anything, and what is learned is the same."""
    plain, _ = run(cluster, "a", name="plain", labels="device")

    kept, sent = run(cluster, "a", name="kept", labels="device", replay=ReplayConfig(when=when))

    assert_same(plain, kept)
    assert sent.replayed == expected


def test_blocks_that_others_teach_are_computed_anew(cluster: Cluster) -> None:
    """A deeper frozen device beside a shallower one is sent changes each round: it begins anew."""
    devices = {"a": DeviceSettings(split=1), "b": DeviceSettings(split=2)}
    settings = {"devices": devices, "rounds": STEPS, "steps_per_round": 1}
    plain, _ = run(cluster, "a", "b", name="plain", **settings)

    kept, sent = run(cluster, "a", "b", name="kept", replay=AUTO, **settings)

    assert_same(plain, kept)
    assert sent.replayed == 2 * ROWS


def test_what_has_no_room_is_sent_again(cluster: Cluster) -> None:
    """A bound on bytes is kept, and costs bytes on the wire alone."""
    plain, _ = run(cluster, "a", name="plain")
    room = ReplayConfig(when="auto", max_bytes=20_000)

    kept, sent = run(cluster, "a", name="kept", replay=room)

    assert_same(plain, kept)
    assert 0 < sent.replayed < 2 * ROWS


@pytest.mark.parametrize("stops_at", [STEPS // 2, STEPS - 2])
def test_a_coordinator_that_resumes_begins_with_nothing(cluster: Cluster, stops_at: int) -> None:
    """After a restart states are sent once more; the run ends where the undisturbed one does."""
    plain, _ = run(cluster, "a", name="plain")
    config = replace(plain.config, name="kept", replay=AUTO)
    first = cluster.serve(config).crash_at(stops_at)
    first.start()
    client = cluster.client("a", sentences(ord("a"), ROWS), state=cluster.folder / "kept").start()
    assert first.wait() == "crashed"
    left = first.folder.path / KEPT_STATES / "left.states"
    left.parent.mkdir(exist_ok=True)
    left.write_text("of a process that was killed")

    second = cluster.serve(config)
    assert not left.exists()
    sent = Sent(second)
    assert second.start().wait() == "completed"
    wait_all([client])

    assert_same(plain, second)
    assert sent.replayed < sent.rows


def test_a_damaged_file_costs_one_more_pass(cluster: Cluster) -> None:
    """A device whose states cannot be read begins anew, and the run ends as it would have."""
    plain, _ = run(cluster, "a", name="plain")
    config = replace(plain.config, name="kept", replay=AUTO)
    serving = cluster.serve(config)

    def spoil(_device: str, report: Any) -> None:
        if report.stamp.step == STEPS // EPOCHS + 1:
            (path,) = (serving.folder.path / KEPT_STATES).iterdir()
            path.write_bytes(bytes(path.stat().st_size))

    serving.trap.on_step = spoil
    sent = Sent(serving)
    serving.start()
    client = cluster.client("a", sentences(ord("a"), ROWS), state=cluster.folder / "kept").start()

    assert serving.wait() == "completed"
    wait_all([client])
    assert_same(plain, serving)
    assert 0 < sent.replayed < 2 * ROWS


def test_dropout_in_frozen_blocks_is_drawn_anew(
    tmp_path: Path, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Where another pass gives other numbers nothing is kept, and the device says why."""
    config = json.loads((cluster.model / "config.json").read_text())
    cluster.model = Path(shutil.copytree(cluster.model, tmp_path / "drops"))
    (cluster.model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))

    _, sent = run(cluster, "a", name="kept", replay=AUTO)

    assert sent.replayed == 0
    assert "replay.off" in caplog.text


def test_a_device_without_torch_sends_once_too(cluster: Cluster) -> None:
    """Graphs give what torch gives, and their states are kept as well."""
    plain, _ = run(cluster, "a", name="plain")
    default = DeviceSettings(split=2, batch_size=BATCH, r=0, codec="float32")
    serving = cluster.serve(
        cluster.config(
            name="kept",
            rounds=EPOCHS,
            steps_per_round=STEPS // EPOCHS,
            min_devices=1,
            default=default,
            replay=AUTO,
        )
    )
    sent = Sent(serving)
    serving.start()
    client = cluster.client("a", sentences(ord("a"), ROWS), backend="onnxruntime").start()

    assert serving.wait(200.0) == "completed"
    wait_all([client], 60.0)
    assert sent.replayed == 2 * ROWS
    for name, value in learned(serving).items():
        np.testing.assert_allclose(value, learned(plain)[name], atol=1e-4)


def test_waves_of_what_is_there_replay_too(cluster: Cluster) -> None:
    """Whichever micro-batches are computed together, each sample is sent once."""
    plain, _ = run(cluster, "a", "b", name="plain")

    kept, sent = run(cluster, "a", "b", name="kept", replay=AUTO, waves="available")

    assert sent.replayed == 2 * (EPOCHS - 1) * ROWS
    for name, value in learned(kept).items():
        np.testing.assert_allclose(value, learned(plain)[name], atol=2e-3)

"""Both programs as processes: what a person sees, how they end, and Ctrl-C."""

from __future__ import annotations

import re
import time

from edge_sdk.transport.keys import create_key_pair, load_key_pair
from tests.e2e.cluster import Cluster
from tests.e2e.programs import Start

NOISE = ("Traceback", "Warning", "warning:", "Loading weights", "%|", "it/s]", "Error in")


def test_a_run_from_keys_to_adapter(files: Cluster, start: Start) -> None:
    """Plain lines without noise and exit code 0; a stranger leaves with one line and code 4.

    A wrong server key is told on the terminal, but nothing proves it: that device goes on trying.
    """
    create_key_pair(files.folder / "stranger.key")
    other = load_key_pair(files.folder / "stranger.key").public
    coordinator = start("coordinator", "serve", "--config", "run.yaml", is_cold=True)
    coordinator.wait_for("listening at")
    misled = start("edge-sdk", "run", "--config", "c.yaml", f"server_key={other}")
    stranger = start("edge-sdk", "run", "--config", "c.yaml", "secret_key=stranger.key")
    devices = [
        start("edge-sdk", "run", "--config", f"{name}.yaml", is_cold=name == "a") for name in "ab"
    ]

    assert [program.wait() for program in (coordinator, *devices)] == [0, 0, 0]

    assert stranger.wait() == 4
    assert len(stranger.lines) == 2, stranger.text
    assert "register" in stranger.lines[-1]
    misled.wait_for_match(f"wrong server key.*{re.escape(other)}.* trying for")
    misled.interrupt()
    assert misled.wait() == 130
    assert len(misled.lines) == 3, misled.text
    for program in (coordinator, *devices, misled, stranger):
        assert not [word for word in NOISE if word in program.text], program.text
    assert (files.folder / "runs" / "run" / "adapter" / "adapter_model.safetensors").is_file()
    status = start("coordinator", "status", "runs/run")
    assert status.wait() == 0
    assert "run run: complete\n2 of 2 rounds" in status.text


def test_one_ctrl_c_is_enough_beside_a_frozen_device(files: Cluster, start: Start) -> None:
    """The coordinator leaves with 130 within 10 s; the frozen device wakes and joins again."""
    serve = ("coordinator", "serve", "--config", "run.yaml", "rounds=5000", "min_devices=2")
    coordinator = start(*serve)
    coordinator.wait_for("listening at")
    frozen, other = (start("edge-sdk", "run", "--config", f"{name}.yaml") for name in "ab")
    other.wait_for("round 1")
    frozen.freeze()

    began_s = time.monotonic()
    coordinator.interrupt()
    assert coordinator.wait() == 130
    assert time.monotonic() - began_s < 10.0
    assert "paused; go on with: coordinator resume" in coordinator.text

    frozen.thaw()
    resumed = start("coordinator", "resume", "runs/run")
    resumed.wait_for("a: ready")
    resumed.wait_for("b: ready")
    resumed.wait_for_match(r"a: step +(\d+)/")


def test_ctrl_c_once_and_twice(files: Cluster, start: Start) -> None:
    """Once: a checkpoint, then exit 130, and it resumes. Twice: exit 130 at once."""
    serve = ("coordinator", "serve", "--config", "run.yaml", "rounds=5000", "min_devices=1")
    coordinator = start(*serve)
    coordinator.wait_for("listening at")
    leaving, staying = (start("edge-sdk", "run", "--config", f"{name}.yaml") for name in "ab")
    for device in (leaving, staying):
        device.wait_for("round 1") if device is staying else device.wait_for("round ")

    leaving.interrupt()
    assert leaving.wait() == 130
    assert leaving.lines[-1] == "ended: stopped"
    # Then two rounds without it: a run that was stopped in its last one would wait for it later.
    coordinator.wait_for_match(r"a: left: stopped(.*\n)+round (.*\n)+round ")
    coordinator.interrupt()
    assert coordinator.wait() == 130
    assert "paused; go on with: coordinator resume" in coordinator.lines[-1]
    checkpoints = sorted((files.folder / "runs" / "run").glob("checkpoint-*"))
    step = int(checkpoints[-1].name.removeprefix("checkpoint-"))

    resumed = start("coordinator", "resume", "runs/run")
    staying.wait_for("joining again")
    resumed.wait_for("b: ready")
    assert int(resumed.wait_for_match(r"b: step +(\d+)/")[1]) > step
    staying.freeze()
    resumed.interrupt()
    resumed.wait_for("stopping after this step")
    began_s = time.monotonic()
    resumed.interrupt()
    assert resumed.wait() == 130
    assert time.monotonic() - began_s < 3.0
    staying.thaw()
    staying.interrupt()
    staying.interrupt()
    assert staying.wait() == 130
    for program in (coordinator, resumed, leaving, staying):
        assert not [word for word in NOISE if word in program.text], program.text


def test_a_copied_key_is_refused_and_a_killed_device_followed(files: Cluster, start: Start) -> None:
    """One line and code 4 while the first lives; its successor after a kill goes on at once."""
    serve = ("coordinator", "serve", "--config", "run.yaml", "rounds=5000", "min_devices=2")
    coordinator = start(*serve)
    coordinator.wait_for("listening at")
    first, other = (start("edge-sdk", "run", "--config", f"{name}.yaml") for name in "ab")
    first.wait_for("round 1")

    clone = start("edge-sdk", "run", "--config", "a.yaml", "state=clone")
    assert clone.wait() == 4
    assert len(clone.lines) == 2, clone.text
    assert "another device with this key is connected from 127.0.0.1 since" in clone.text
    assert "a: left" not in coordinator.text

    first.kill()
    successor = start("edge-sdk", "run", "--config", "a.yaml")
    successor.wait_for("round ")
    for program in (coordinator, other, successor):
        program.interrupt()
    assert [program.wait() for program in (coordinator, other, successor)] == [130, 130, 130]

"""Real programs end with the exit code of what went wrong, and one line that says it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.rounds.admission import Admission
from edge_sdk.errors import RefusedError
from edge_sdk.protocol import headers
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import Gradient
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import PATIENCE_S, Cluster, sentences, wait_all, write_rows
from tests.e2e.programs import Program, Start, free_port, write_yaml

Sent = tuple[Any, dict[str, TensorOut]]


def device_yaml(cluster: Cluster, address: str, name: str = "a") -> str:
    """Write a device's configuration and data; return the file's name."""
    settings = {
        "coordinator": address,
        "server_key": cluster.public,
        "secret_key": f"{name}.key",
        "data": {"path": f"{name}.jsonl"},
        "cache": str(cluster.parts),
        "device": "cpu",
    }
    write_rows(cluster.folder / f"{name}.jsonl", sentences(ord(name)))
    return write_yaml(cluster.folder / f"{name}.yaml", settings).name


def run_yaml(cluster: Cluster, address: str) -> str:
    """Write the configuration of a coordinator; return the file's name."""
    settings = {
        "model": str(cluster.model),
        "listen": address,
        "secret_key": "coordinator.key",
        "allow_list": "devices.yaml",
        "runs": "runs",
        "name": "run",
        "rounds": 2,
        "steps_per_round": 3,
        "min_devices": 1,
        "default": {"split": 2, "batch_size": 4, "codec": "float32"},
        "device": "cpu",
    }
    return write_yaml(cluster.folder / "run.yaml", settings).name


def last_line(program: Program, code: int, prog: str) -> str:
    """Wait for a program's end with *code*, and return the one line that says why."""
    assert program.wait() == code, program.text
    said = [line for line in program.lines if line.startswith(f"{prog}: ")]
    assert len(said) == 1, program.text
    assert program.lines[-1] == said[0], program.text
    assert "Traceback" not in program.text
    return said[0]


# ---- a device ----


def spoilt(message: Any, tensors: dict[str, TensorOut]) -> Sent:
    """Gradients become NaN on their way."""
    if isinstance(message, Gradient):
        tensors = {n: (np.full_like(array, np.nan), c) for n, (array, c) in tensors.items()}
    return message, tensors


def cut(message: Any, tensors: dict[str, TensorOut]) -> Sent:
    """Gradients lose a row on their way."""
    if isinstance(message, Gradient):
        tensors = {n: (array[1:], codec) for n, (array, codec) in tensors.items()}
    return message, tensors


DEVICES = {
    "a message that is none": (cut, 5, "Gradient: tensor 'grad': (3, "),
    "a number that is none": (spoilt, 10, "grad from the coordinator: "),
}


@pytest.mark.parametrize("case", DEVICES)
def test_a_device_says_what_it_cannot_go_on_with(
    cluster: Cluster, start: Start, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Exit code 5 for what breaks the protocol, 10 for NaN, each with what it was."""
    change, code, words = DEVICES[case]
    send = Admission.send

    def changed(self: Any, device: str, message: Any, tensors: Any = None) -> None:
        send(self, device, *change(message, dict(tensors or {})))

    monkeypatch.setattr(Admission, "send", changed)
    cluster.serve(cluster.config(min_devices=1)).start()

    device = start("edge-sdk", "run", "--config", device_yaml(cluster, cluster.address))

    assert words in last_line(device, code, "edge-sdk")


def test_a_step_too_long_ends_a_device(cluster: Cluster, start: Start) -> None:
    """With a learning rate beyond reason its own numbers are none after a step: exit code 10."""
    training = TrainingConfig(learning_rate=1e30, max_grad_norm=0.0)
    cluster.serve(cluster.config(min_devices=1, training=training)).start()

    device = start("edge-sdk", "run", "--config", device_yaml(cluster, cluster.address))

    assert "NaN or infinite" in last_line(device, 10, "edge-sdk")


# ---- the coordinator ----


def test_a_run_that_diverges_ends_the_coordinator(cluster: Cluster, start: Start) -> None:
    """Exit code 10 and a line that says what to do; the device, frozen here, is not to blame."""
    address = f"tcp://127.0.0.1:{free_port()}"
    override = ("training.learning_rate=1e30", "training.max_grad_norm=0", "default.r=0")
    coordinator = start(
        *("coordinator", "serve", "--config", run_yaml(cluster, address)),
        *("labels=server", *override),
    )
    device = start("edge-sdk", "run", "--config", device_yaml(cluster, address))

    line = last_line(coordinator, 10, "coordinator")

    assert "the run has diverged" in line
    assert "training.learning_rate" in line
    device.interrupt()
    assert device.wait() == 130


NO_ROOM = """
import errno, sys
from coordinator.results.run_folder import RunFolder
from coordinator.cli import main
append = RunFolder.append
def full(self, name, row):
    if row.get("event") == "round.started":
        raise OSError(errno.{error}, "as the kernel says it")
    append(self, name, row)
RunFolder.append = full
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("error", ["EMFILE", "ENFILE", "ENOSPC"])
def test_trouble_of_the_kernel_ends_the_coordinator(
    cluster: Cluster, start: Start, error: str
) -> None:
    """Exit code 9 and one line; `resume` goes on with the device that was there, to the end."""
    address = f"tcp://127.0.0.1:{free_port()}"
    script = Path(cluster.folder, "no_room.py")
    script.write_text(NO_ROOM.format(error=error))
    config = run_yaml(cluster, address)
    coordinator = start("python", str(script), "serve", "--config", config)
    device = start("edge-sdk", "run", "--config", device_yaml(cluster, address))

    assert "as the kernel says it" in last_line(coordinator, 9, "coordinator")

    resumed = start("coordinator", "resume", "runs/run")
    assert [resumed.wait(), device.wait()] == [0, 0], resumed.text + device.text


FEW = """
import resource, sys
from coordinator.cli import main
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
sys.exit(main(sys.argv[1:]))
"""


def test_a_coordinator_may_open_as_many_files_as_the_system_allows(
    cluster: Cluster, start: Start
) -> None:
    """Each connection of a device is one: the soft limit is raised to the hard one."""
    script = Path(cluster.folder, "few.py")
    script.write_text(FEW)
    serve = ("serve", "--config", run_yaml(cluster, f"tcp://127.0.0.1:{free_port()}"))
    coordinator = start("python", str(script), *serve)
    coordinator.wait_for("listening at")

    limits = Path(f"/proc/{coordinator.pid}/limits").read_text(encoding="ascii")
    [found] = [line.split() for line in limits.splitlines() if line.startswith("Max open files")]

    soft, hard = found[3:5]
    assert soft == hard
    coordinator.interrupt()
    assert coordinator.wait() == 130


BUG = """
import sys
from coordinator.rounds.state import RunState
from coordinator.cli import main
def broken(self):
    raise KeyError("a bug")
RunState.decide = broken
sys.exit(main(sys.argv[1:]))
"""


def test_a_bug_ends_the_coordinator_in_one_line(cluster: Cluster, start: Start) -> None:
    """Exit code 1; the traceback is in the log for whoever asks for it."""
    script = Path(cluster.folder, "bug.py")
    script.write_text(BUG)
    serve = ("serve", "--config", run_yaml(cluster, f"tcp://127.0.0.1:{free_port()}"))

    line = last_line(start("python", str(script), *serve), 1, "coordinator")

    assert "KeyError: 'a bug'" in line
    told = start("python", str(script), "--log-level", "info", *serve, "name=other")
    assert told.wait() == 1
    assert "Traceback" in told.text


# ---- other versions ----

OTHER = """
import sys
from {module} import {name} as holder
holder.{version} = 2
from {program} import main
sys.exit(main(sys.argv[1:]))
"""
OTHERS = {
    "header": ("edge_sdk.protocol", "headers", "PROTOCOL_VERSION"),
    "frame": ("edge_sdk.protocol", "packets", "FRAME_VERSION"),
}


@pytest.mark.parametrize("side", ["device", "coordinator"])
@pytest.mark.parametrize("case", OTHERS)
def test_another_version_is_refused_on_both_terminals(
    cluster: Cluster, start: Start, case: str, side: str
) -> None:
    """Whichever side is the newer one: both say which versions met, and the device ends."""
    address = f"tcp://127.0.0.1:{free_port()}"
    module, name, version = OTHERS[case]
    programs = {"coordinator": ["coordinator"], "device": ["edge-sdk"]}
    script = Path(cluster.folder, "other.py")
    program = {"coordinator": "coordinator.cli", "device": "edge_sdk.cli"}[side]
    script.write_text(OTHER.format(module=module, name=name, version=version, program=program))
    programs[side] = ["python", str(script)]
    serve = ("serve", "--config", run_yaml(cluster, address))
    coordinator = start(*programs["coordinator"], *serve)
    coordinator.wait_for("listening at")

    device = start(*programs["device"], "run", "--config", device_yaml(cluster, address))

    line = last_line(device, 5, "edge-sdk")
    assert f"{case.replace('header', 'protocol')} version" in line
    assert "this side speaks" in line
    coordinator.wait_for_match("a: rejected: .* version [12].* this side speaks [12]")
    coordinator.interrupt()
    assert coordinator.wait() == 130


def test_a_welcome_of_another_protocol_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose coordinator says that it speaks another protocol names both, and ends."""
    welcome = Admission._welcome
    monkeypatch.setattr(
        Admission, "_welcome", lambda self, device: replace(welcome(self, device), protocol=2)
    )
    cluster.serve(cluster.config(min_devices=1)).start()
    [client] = cluster.start("a")

    with pytest.raises(RefusedError, match=r"protocol version 2 \(edgesplit .*, this device 1 \("):
        client.wait(PATIENCE_S)


def test_a_newer_release_of_the_same_version_works(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown fields of headers, bodies and control frames are ignored, on both sides."""
    pack = headers.pack

    def packed(value: Any) -> bytes:
        more = {"why": "because", "since": [2, {"x": None}]}
        if isinstance(value, dict) and "body" in value:
            value = {**value, **more, "body": {**value["body"], **more}}
        elif isinstance(value, tuple):
            value = (value[0], {**value[1], **more})
        return pack(value)

    monkeypatch.setattr(headers, "pack", packed)
    serving = cluster.serve().start()
    clients = cluster.start()

    assert serving.wait() == "completed"
    wait_all(clients)

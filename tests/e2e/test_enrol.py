"""Enrolment as two people do it: a code on the coordinator, one command on the device."""

from __future__ import annotations

import json
import re

from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.transport.keys import create_key_pair, fingerprint, load_key_pair
from tests.e2e.cluster import Cluster, sentences, write_rows
from tests.e2e.programs import Start


def test_a_board_enrols_into_a_run_that_waits_and_trains(files: Cluster, start: Start) -> None:
    """Beside a coordinator that serves: no file is copied, no run restarted, nothing else said.

    A second board that was refused is let in by the operator, who recognises its fingerprint.
    """
    folder = files.folder
    AllowList(files.allowed).unregister("a")
    AllowList(files.allowed).unregister("b")
    AllowList(files.allowed).unregister("c")
    coordinator = start("coordinator", "serve", "--config", "run.yaml")
    coordinator.wait_for("listening at")

    code = start("coordinator", "enrol", "kitchen", "--config", "run.yaml", "--minutes", "5")
    assert code.wait() == 0
    command = re.search(r"^edge-sdk (enrol \S+)$", code.text, re.MULTILINE)
    assert command is not None, code.text
    device = start("edge-sdk", *command[1].split(), "--config", "board/device.yaml")
    assert device.wait() == 0, device.text
    board = load_key_pair(folder / "board" / "device.key").public
    assert "enrolled as kitchen" in device.lines[0]
    assert fingerprint(board) in device.text
    assert AllowList(files.allowed).devices() == {"kitchen": board}
    coordinator.wait_for(f"kitchen: enrolled from 127.0.0.1, with the key {fingerprint(board)}")
    events = (folder / "runs" / "run" / "events.jsonl").read_text()
    [row] = [json.loads(line) for line in events.splitlines() if "device.enrolled" in line]
    assert (row["device"], row["fingerprint"]) == ("kitchen", fingerprint(board))

    thief = start("edge-sdk", *command[1].split(), "--config", "thief/device.yaml")
    assert thief.wait() == 4
    assert re.fullmatch(r"edge-sdk: this code was used already, by the key .*", thief.text)
    assert not (folder / "thief" / "device.yaml").exists()

    create_key_pair(folder / "shed.key")
    refused = start("edge-sdk", "run", "--config", "b.yaml", "secret_key=shed.key")
    assert refused.wait() == 4
    known = fingerprint(load_key_pair(folder / "shed.key").public)
    assert known in _pending(start, known)
    approved = start("coordinator", "client", "approve", "b", known)
    assert approved.wait() == 0, approved.text

    write_rows(folder / "mine.jsonl", sentences(1))
    overrides = ("data.path=mine.jsonl", "device=cpu", f"cache={files.parts}")
    config = ("--config", "board/device.yaml")
    first = start("edge-sdk", "run", *config, *overrides)
    second = start("edge-sdk", "run", "--config", "b.yaml", "secret_key=shed.key")
    assert [program.wait() for program in (coordinator, first, second)] == [0, 0, 0]
    assert first.lines[-1] == "ended: the run is complete"
    assert (folder / "runs" / "run" / "adapter" / "adapter_model.safetensors").is_file()


def _pending(start: Start, wanted: str) -> str:
    """Return what `client pending` lists, once the coordinator has written *wanted* down."""
    while True:
        listed = start("coordinator", "client", "pending")
        assert listed.wait() == 0, listed.text
        if wanted in listed.text:
            return listed.text


def test_a_device_waits_for_the_coordinator_that_it_enrols_with(
    files: Cluster, start: Start
) -> None:
    """Told in one line where it is not to wait; else it enrols as soon as there is one."""
    code = start("coordinator", "enrol", "kitchen", "--config", "run.yaml")
    assert code.wait() == 0
    assert "Nobody listens at" in code.text
    words = re.search(r"^edge-sdk (enrol \S+)$", code.text, re.MULTILINE)
    assert words is not None

    device = start("edge-sdk", *words[1].split(), "--config", "board.yaml", "--wait", "0")

    assert device.wait() == 3
    assert len(device.lines) == 1
    assert "no coordinator serves; start it (coordinator serve)" in device.text
    assert not (files.folder / "board.yaml").exists()

    waiting = start("edge-sdk", *words[1].split(), "--config", "board.yaml")
    waiting.wait_for("yet; trying for 60 s")
    coordinator = start("coordinator", "serve", "--config", "run.yaml")
    assert waiting.wait() == 0, waiting.text
    coordinator.wait_for("kitchen: enrolled from 127.0.0.1")

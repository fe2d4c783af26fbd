"""The doctor beside a run: it finds its way to a real coordinator, and the run does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_sdk.client.callbacks import Callback
from edge_sdk.client.config import ClientConfig
from edge_sdk.doctor import examine as doctor
from edge_sdk.doctor import link as doctor_link
from edge_sdk.doctor.finding import Finding
from edge_sdk.protocol.messages import StepReport
from tests.e2e.cluster import Cluster, sentences, wait_all, write_rows
from tests.e2e.programs import Program, write_yaml

LINK = ["name", "reach", "mtu", "handshake", "session", "link"]
Programs = Callable[..., Program]


def settings(cluster: Cluster, name: str) -> dict[str, Any]:
    """The config of a device."""
    return {
        "coordinator": cluster.address,
        "server_key": cluster.public,
        "secret_key": cluster.folder / f"{name}.key",
        "state": cluster.folder,
    }


def visit(cluster: Cluster, name: str, *, session: bool) -> dict[str, Finding]:
    """What the doctor finds on its way with the key of *name*."""
    config = ClientConfig(**settings(cluster, name))
    return {one.check: one for one in doctor.look_at_link(config, session=session)}


class Interlude(Callback):
    """Does something else between two steps of a run."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act, self.found = act, None

    def on_step_end(self, report: StepReport) -> None:
        """Act once, in the middle of a round."""
        if report.stamp.step == 1:
            self.found = self.act()


def trained(cluster: Cluster, name: str, act: Callable[[], Any]) -> tuple[bytes, Any]:
    """Run devices a and b, with *act* between two steps of a; returns metrics and its result."""
    serving = cluster.serve(cluster.config(name=name, min_devices=2)).start()
    interlude = Interlude(act)
    state = cluster.folder / f"state-{name}"
    clients = [
        cluster.client("a", sentences(1), interlude, state=state).start(),
        cluster.client("b", sentences(2), state=state).start(),
    ]
    wait_all(clients)
    assert serving.wait() == "completed"
    cluster.address = "tcp://127.0.0.1:*"
    return serving.metrics, interlude.found


def test_a_run_does_not_notice_the_doctor(cluster: Cluster) -> None:
    """Another device's doctor with a session, and a member's own without one: the same bytes."""
    alone, _ = trained(cluster, "alone", lambda: None)
    beside, other = trained(cluster, "beside", lambda: visit(cluster, "c", session=True))
    within, own = trained(cluster, "within", lambda: visit(cluster, "a", session=False))

    assert alone == beside == within
    assert list(other) == list(own) == LINK
    assert {one.status for one in other.values()} == {"ok"}, other
    assert "would take this device in as c" in other["session"].text
    assert "Mbit/s up" in other["link"].text
    assert [one.status for one in own.values()] == ["ok"] * 4 + ["skipped"] * 2, own
    assert own["session"].cure.startswith("edge-sdk doctor --session")


def test_a_session_of_the_same_key_is_refused_while_one_is_open(cluster: Cluster) -> None:
    """The doctor hears who is at work with this key, and the device at work goes on."""
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    interlude = Interlude(lambda: visit(cluster, "a", session=True))
    client = cluster.client("a", sentences(1), interlude).start()
    wait_all([client, cluster.client("b", sentences(2)).start()])

    assert serving.wait() == "completed"
    assert interlude.found is not None
    assert interlude.found["session"].status == "failure"
    assert "another device with this key is connected from" in interlude.found["session"].text


def test_a_coordinator_that_refuses_says_why(cluster: Cluster) -> None:
    """Another model is a failure with the coordinator's own words."""
    cluster.serve(cluster.config(min_devices=2)).start()
    config = ClientConfig(**settings(cluster, "c"), model_hash="0" * 64)

    found = {one.check: one for one in doctor.look_at_link(config, session=True)}

    assert found["handshake"].status == "ok"
    assert found["session"].status == "failure"
    assert "correct or remove `model_hash`" in found["session"].text
    assert found["link"].status == "skipped"


def test_a_coordinator_that_hangs_is_not_waited_for_without_end(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gateway takes the connection, its loop says no welcome: a failure after the limit."""
    monkeypatch.setattr(doctor_link, "SESSION_S", 0.5)
    serving = cluster.serve(cluster.config(min_devices=2))  # its loop is not started
    config = doctor.links.LinkConfig(
        address=cluster.address,
        server_key=cluster.public,
        keys=doctor.load_key_pair(cluster.folder / "a.key"),
    )

    found = doctor_link.open_session(config, "", 0.5)
    serving.gateway.close()

    assert found == (None, None, None)
    assert "no welcome within" in doctor_link.check_session(found, 1)[0].text


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Programs]:
    """Start a program in the cluster's folder; it is ended with the test."""
    programs: list[Program] = []

    def begin(name: str, *arguments: str) -> Program:
        programs.append(Program(name, *arguments, cwd=cluster.folder, is_cold=True))
        return programs[-1]

    yield begin
    for program in programs:
        program.kill()


def test_the_program_from_config_to_bandwidth(cluster: Cluster, start: Programs) -> None:
    """The real command, its real kernels, a real coordinator: JSON without noise, exit code 0."""
    cluster.serve(cluster.config(min_devices=2)).start()
    rows = write_rows(cluster.folder / "c.jsonl", sentences(3))
    config = {**settings(cluster, "c"), "data": {"path": rows}, "cache": cluster.parts}
    write_yaml(cluster.folder / "c.yaml", {**config, "device": "cpu"})

    program = start("edge-sdk", "doctor", "--config", "c.yaml", "--session", "--format", "json")

    assert program.wait() == 0, program.text
    found = {one["check"]: one for one in json.loads(program.text)}
    kernels = ("torch", "kernel", "bfloat16", "float16", "quantised")
    assert [found[name]["status"] for name in kernels] == ["ok"] * len(kernels)
    assert found["data"]["text"].endswith("24 to train, 0 to validate")
    assert [found[name]["status"] for name in LINK] == ["ok"] * len(LINK)
    assert "failure" not in {one["status"] for one in found.values()}

"""What a device tells of its errors: class and place, whatever stands in the words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import errors
from edge_sdk.client.callbacks import Callback
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import (
    DataError,
    EdgeError,
    NotAccepted,
    OutOfMemory,
    as_edge_error,
    told_text,
)
from edge_sdk.protocol.messages import Failure
from edge_sdk.protocol.plan import Plan
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import Cluster, wait_all, write_rows

SECRET = "my PIN is 4711"
CHATS = [
    {"messages": [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "ok"}]}
]
QUOTES = "{{ raise_exception(messages[0]['content']) }}"


def raised(error: EdgeError) -> EdgeError:
    """An error that was raised here and caught."""
    try:
        raise error
    except EdgeError as caught:
        return caught


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", [k for k in KINDS if issubclass(k, EdgeError) and not k.is_public])
def test_words_stay_on_the_device(kind: type[EdgeError]) -> None:
    """Of an error that may hold anything, its class is told, and nothing of its words."""
    text = told_text(raised(kind(f"/home/eve/train.jsonl:3: {SECRET}")))

    assert text == "what it says stands on the device's terminal alone"


def test_the_place_is_one_of_our_source() -> None:
    """Beside the class the line of our own source is told in which it was raised last."""
    try:
        DataConfig(max_length=1)
    except ValueError as error:
        told = told_text(OutOfMemory(SECRET).with_traceback(error.__traceback__))

    assert told.startswith("raised in edge_sdk.data.rows, line ")
    assert SECRET not in told


def test_of_an_error_that_nobody_foresaw_only_its_class_is_told_beside_the_place() -> None:
    """A library's or an application's exception is named where it is one of Python's own."""
    try:
        DataConfig(max_length=1)
    except ValueError as error:
        wild = KeyError(SECRET).with_traceback(error.__traceback__)
    told = told_text(as_edge_error(wild))

    assert told.startswith("KeyError, raised in edge_sdk.data.rows, line ")
    assert SECRET not in told


def test_a_device_that_fails_before_it_is_ready_is_seen(cluster: Cluster, tmp_path: Path) -> None:
    """Class and place stand on the coordinator's console and in its events, once."""
    serving = cluster.serve(cluster.config(min_devices=1)).start()
    with pytest.raises(DataError, match="absent"):
        cluster.client("a", data=DataConfig(path=str(tmp_path / "absent.jsonl"))).run()
    clients = cluster.start("b")

    assert serving.wait() == "completed"
    wait_all(clients)
    [left] = [row for row in serving.events if row["event"] == "device.left"]
    assert (left["device"], left["reason"][:21]) == ("a", "DataError: raised in ")
    assert [note for note in serving.trap.notes if "a: left: DataError: raised in edge" in note]


class Broken(Callback):
    """An application whose own code fails."""

    def on_plan(self, plan: Plan) -> None:
        """Fail."""
        raise KeyError(SECRET)


def test_an_application_that_fails_is_seen(cluster: Cluster) -> None:
    """What nobody foresaw ends the device, and the coordinator hears of which kind it was."""
    serving = cluster.serve(cluster.config(min_devices=1)).start()
    with pytest.raises(KeyError):
        cluster.client("a", callback=Broken()).run()
    clients = cluster.start("b")

    assert serving.wait() == "completed"
    wait_all(clients)
    [left] = [row for row in serving.events if row["event"] == "device.left"]
    assert left["reason"].startswith("EdgeError: KeyError, raised in edge_sdk.")
    assert SECRET not in left["reason"]


def test_what_a_device_does_not_accept_is_told_in_words() -> None:
    """The coordinator's operator reads which setting of the device refuses the run."""
    assert (
        told_text(raised(NotAccepted("this device accepts only x"))) == "this device accepts only x"
    )


def test_a_template_that_quotes_a_chat_tells_nobody(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words reach the device's own terminal; class and place reach the coordinator."""
    sent: list[Any] = []
    send = ZmqLink.send
    monkeypatch.setattr(
        ZmqLink,
        "send",
        lambda link, message, *rest: (sent.append(message), send(link, message, *rest)),
    )
    cluster.model = Path(shutil.copytree(cluster.model, tmp_path / "model"))
    template = cluster.model / "chat_template.jinja"
    honest = template.read_text()
    template.write_text(QUOTES)
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    path = write_rows(tmp_path / "private-rows.jsonl", CHATS * 4)
    with pytest.raises(DataError, match=SECRET):
        cluster.client("a", data=DataConfig(path=str(path))).run()
    own = tmp_path / "own.jinja"
    own.write_text(honest)
    clients = cluster.start("b")
    clients += [cluster.client("a", data=DataConfig(path=str(path), chat_template=own)).start()]

    assert serving.wait() == "completed"
    wait_all(clients)
    (failure,) = [message for message in sent if isinstance(message, Failure)]
    assert (failure.error, failure.text[:19]) == ("DataError", "raised in edge_sdk.")
    told = "\n".join([*serving.trap.notes, *map(str, serving.events)])
    assert "DataError: raised in edge_sdk." in told
    for word in (SECRET, "4711", "private-rows", str(tmp_path)):
        assert word not in told

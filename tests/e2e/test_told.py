"""What a device tells of its errors: class and place, whatever stands in the words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import errors
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import DataError, EdgeError, NotAccepted, OutOfMemory, told_text
from edge_sdk.protocol.messages import Failure
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

"""The allow-list and the answer to libzmq: registered keys get in, everything else does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from coordinator.gateway.allow_list import ZAP_DOMAIN, AllowList, ZapHandler
from coordinator.gateway.ration import Trouble
from edge_sdk.errors import ConfigError
from edge_sdk.transport.keys import make_key_pair

ONE, TWO = make_key_pair().public, make_key_pair().public


def test_register_list_unregister(tmp_path: Path) -> None:
    """Names are registered, listed in order, found by key, and removed."""
    allowed = AllowList(tmp_path / "allowed.json")
    allowed.register("b", ONE)
    allowed.register("a", TWO)

    assert list(allowed.devices()) == ["a", "b"]
    assert allowed.name_of(ONE) == "b"
    allowed.unregister("b")
    assert allowed.name_of(ONE) is None
    assert AllowList(tmp_path / "allowed.json").devices() == {"a": TWO}


def test_change_by_another_process_is_seen(tmp_path: Path) -> None:
    """A list that is open sees what another one writes."""
    ours, theirs = AllowList(tmp_path / "a.json"), AllowList(tmp_path / "a.json")
    theirs.register("x", ONE)

    assert ours.name_of(ONE) is None
    assert ours.reload_if_changed()
    assert ours.name_of(ONE) == "x"
    assert not ours.reload_if_changed()


def test_removed_file_lets_nobody_in(tmp_path: Path) -> None:
    """Without a list there are no devices."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)
    (tmp_path / "a.json").unlink()

    assert allowed.reload_if_changed()
    assert allowed.devices() == {}


def test_broken_file_keeps_the_last_good_list(tmp_path: Path) -> None:
    """A slip of the editor throws nobody out of a run, but a new coordinator refuses the file."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)
    (tmp_path / "a.json").write_text("{")

    assert not allowed.reload_if_changed()
    assert allowed.name_of(ONE) == "x"
    with pytest.raises(ConfigError, match="not a list of devices"):
        AllowList(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content",
    ["[]", '{"devices": []}', '{"devices": {"x": 1}}', '{"devices": {"../x": "k"}}', '{"a": 1}'],
)
def test_malformed_lists_are_config_errors(tmp_path: Path, content: str) -> None:
    """Whatever the file holds, the error is ours and names it."""
    (tmp_path / "a.json").write_text(content)

    with pytest.raises(ConfigError, match="a.json"):
        AllowList(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x", "x" * 65, "x\n"])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    """A name that could be a path or an escape sequence is refused."""
    with pytest.raises(ConfigError, match="device name"):
        AllowList(tmp_path / "a.json").register(name, ONE)


def test_one_key_has_one_name(tmp_path: Path) -> None:
    """The same key cannot be registered twice, by call or by hand."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)

    with pytest.raises(ConfigError, match="registered as 'x'"):
        allowed.register("y", ONE)
    (tmp_path / "a.json").write_text(json.dumps({"devices": {"x": ONE, "y": ONE}}))
    with pytest.raises(ConfigError, match="same key"):
        AllowList(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("frames", "status"),
    [
        ([ZAP_DOMAIN.encode(), b"1.2.3.4", b"", b"CURVE", z85.decode(ONE)], b"200"),
        ([ZAP_DOMAIN.encode(), b"1.2.3.4", b"", b"CURVE", z85.decode(TWO)], b"400"),
        ([b"other", b"1.2.3.4", b"", b"CURVE", z85.decode(ONE)], b"400"),
        ([ZAP_DOMAIN.encode(), b"1.2.3.4", b"", b"NULL"], b"400"),
        ([ZAP_DOMAIN.encode(), b"\xff", b"", b"CURVE", b"short"], b"400"),
        ([ZAP_DOMAIN.encode(), b"", b"", b"PLAIN", b"user", b"password"], b"400"),
    ],
)
def test_only_registered_curve_keys_get_in(
    tmp_path: Path, frames: list[bytes], status: bytes
) -> None:
    """The handler says yes to a registered CURVE key in our domain, and no to all else."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)
    with zmq.Context() as context:
        zap = ZapHandler(context, allowed, Trouble())
        with context.socket(zmq.REQ) as asker:
            asker.connect("inproc://zeromq.zap.01")
            asker.send_multipart([b"1.0", b"id", *frames])
            zap.answer_all()
            answer = asker.recv_multipart()
        zap.close()

    assert answer[:3] == [b"1.0", b"id", status]
    assert answer[4] == (ONE.encode() if status == b"200" else b"")


def test_nonsense_does_not_stop_the_handler(tmp_path: Path) -> None:
    """A malformed question gets no answer, and the next one is answered."""
    allowed = AllowList(tmp_path / "a.json")
    with zmq.Context() as context:
        zap = ZapHandler(context, allowed, Trouble())
        with context.socket(zmq.DEALER) as asker:
            asker.connect("inproc://zeromq.zap.01")
            asker.send_multipart([b"nonsense"])
            asker.send_multipart([b"", b"1.0"])
            asker.send_multipart([b"", b"1.0", b"id", b"d", b"a", b"", b"CURVE", b""])
            zap.answer_all()
            answer = asker.recv_multipart()
        zap.close()

    assert answer[3] == b"400"

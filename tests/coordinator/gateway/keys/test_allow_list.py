"""The allow-list and the answer to libzmq: registered keys get in, everything else does not."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import pytest
import zmq
from zmq.utils import z85

from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.zap import ZAP_DOMAIN, ZapHandler
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


def test_a_removed_file_lets_nobody_in(tmp_path: Path) -> None:
    """Without a list there are no devices, once that is certain."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)
    (tmp_path / "a.json").unlink()

    assert [allowed.reload_if_changed() for _ in range(3)] == [False, True, False]
    assert allowed.devices() == {}


def test_a_damaged_file_keeps_whose_key_still_stands_in_it(tmp_path: Path) -> None:
    """A slip of the editor throws out nobody else, and a new coordinator refuses the file."""
    path = tmp_path / "a.json"
    allowed = AllowList(path)
    allowed.register("x", ONE)
    allowed.register("y", TWO)
    path.write_text(path.read_text().replace(TWO, "").rstrip()[:-1])

    assert not allowed.reload_if_changed()
    assert allowed.name_of(TWO) == "y"
    assert allowed.reload_if_changed()
    assert allowed.devices() == {"x": ONE}
    with pytest.raises(ConfigError, match="not a list of devices"):
        AllowList(path)


def test_a_file_that_is_being_written_changes_nothing(tmp_path: Path) -> None:
    """An editor that empties the file before it fills it throws nobody out."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)
    content = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text("")
    assert not allowed.reload_if_changed()
    (tmp_path / "a.json").write_text(content)

    assert not allowed.reload_if_changed()
    assert allowed.devices() == {"x": ONE}


def rename(path: Path, text: str) -> None:
    """Replace the file as a whole."""
    other = path.with_name("other")
    other.write_text(text)
    other.replace(path)


def in_place(path: Path, text: str) -> None:
    """Write into the file that is there."""
    path.write_text(text)


def unseen(path: Path, text: str) -> None:
    """Write as many bytes, and set the times back."""
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def by_a_link(path: Path, text: str) -> None:
    """Put a symbolic link in its place."""
    path.with_name("target").write_text(text)
    path.unlink()
    path.symlink_to(path.with_name("target"))


@pytest.mark.parametrize("change", [rename, in_place, unseen, by_a_link])
def test_a_key_that_is_replaced_is_out_however_the_file_was_changed(
    tmp_path: Path, change: Callable[[Path, str], None]
) -> None:
    """What stands in the file counts, at once; not its times, its size or its inode."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)

    change(allowed.path, allowed.path.read_text().replace(ONE, TWO))

    assert allowed.reload_if_changed()
    assert allowed.name_of(ONE) is None
    assert allowed.name_of(TWO) == "x"


def test_while_the_file_may_not_be_read_nobody_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who knows what stands in it? When it can be read again all are back."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing(errno.EACCES))
        assert [allowed.reload_if_changed() for _ in range(3)] == [False, True, False]
        assert (allowed.is_closed, allowed.devices()) == (True, {})
        with pytest.raises(ConfigError, match="cannot read"):
            AllowList(tmp_path / "a.json")

    assert allowed.reload_if_changed()
    assert (allowed.is_closed, allowed.devices()) == (False, {"x": ONE})


def failing(number: int) -> Callable[..., NoReturn]:
    """Return something that fails as the kernel says."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO])
def test_trouble_of_the_moment_throws_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A lack of descriptors says nothing about who may come."""
    allowed = AllowList(tmp_path / "a.json")
    allowed.register("x", ONE)
    monkeypatch.setattr(Path, "open", failing(number))

    assert [allowed.reload_if_changed() for _ in range(3)] == [False] * 3
    assert allowed.devices() == {"x": ONE}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
def test_a_list_that_root_has_changed_stays_readable_for_its_owner(tmp_path: Path) -> None:
    """`sudo coordinator client unregister` reaches a coordinator that is not root."""
    path = tmp_path / "a.json"
    AllowList(path).register("x", ONE)
    os.chown(path, 12345, 12345)

    AllowList(path).register("y", TWO)

    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12345)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
def test_a_list_that_another_user_has_changed_stays_readable() -> None:
    """Who may write to the folder and give nothing away leaves a file that all may read."""
    with TemporaryDirectory() as name:  # which another user may enter
        folder = Path(name)
        folder.chmod(0o777)
        AllowList(folder / "a.json").register("x", ONE)
        os.chown(folder / "a.json", 12345, 12345)
        (folder / "a.json").chmod(0o644)
        as_user(23456, lambda: AllowList(folder / "a.json").unregister("x"))

        assert (folder / "a.json").stat().st_uid == 23456
        assert (folder / "a.json").stat().st_mode & 0o444 == 0o444
        assert AllowList(folder / "a.json").devices() == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be somebody else")
def test_who_may_not_change_the_list_cannot_hold_its_lock() -> None:
    """A lock that an earlier version left open to all is closed, and is the owner's."""
    with TemporaryDirectory() as name:
        folder, lock = Path(name), Path(name) / "a.json.lock"
        folder.chmod(0o755)
        os.chown(folder, 12345, 12345)
        lock.touch()
        lock.chmod(0o644)
        AllowList(folder / "a.json").register("x", ONE)

        assert (lock.stat().st_uid, lock.stat().st_mode & 0o777) == (12345, 0o600)
        as_user(23456, lambda: refused(lock))
        as_user(12345, lambda: AllowList(folder / "a.json").unregister("x"))


def refused(path: Path) -> None:
    """Fail if the file can be opened."""
    with pytest.raises(PermissionError):
        path.open()


def as_user(number: int, act: Callable[[], None]) -> None:
    """Do something in a process of another user."""
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgid(number)
            os.setuid(number)
            act()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


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


def test_a_key_is_let_in_the_moment_it_is_registered(tmp_path: Path) -> None:
    """Both connections of a device are, also between two looks at the list; news stay news."""
    allowed = AllowList(tmp_path / "a.json")
    context = zmq.Context()
    try:
        zap = ZapHandler(context, allowed, Trouble())
        AllowList(allowed.path).register("x", ONE)
        assert zap._name_of(ONE) == "x"
        assert zap.has_news(1.0), "sessions of keys that went must end"
        assert not zap.has_news(1.0)

        allowed.path.write_text("")
        assert zap._name_of(TWO) is None
        assert zap._name_of(TWO) is None
        assert zap._name_of(ONE) == "x", "a moment of an editor is no second look"
        zap.close()
    finally:
        context.term()

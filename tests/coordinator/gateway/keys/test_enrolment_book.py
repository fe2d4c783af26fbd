"""The book of codes: each is good once, for one device, for a while; to read it lets nobody in."""

from __future__ import annotations

import fcntl
import json
import os
import random
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.gateway.keys import enrolment_book as books
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import MOST_CLOSED, EnrolmentBook
from edge_sdk.errors import ConfigError, RefusedError, StorageError
from edge_sdk.transport.enrol_code import EnrolCode, one_time_keys, write_code
from edge_sdk.transport.keys import make_key_pair

SERVER = make_key_pair()
ONE, TWO = make_key_pair().public, make_key_pair().public
ADDRESS = "tcp://10.0.0.1:7070"


class Desk:
    """A coordinator's book and list, and the operator's, over the same files."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 1e9
        path = folder / "devices.yaml"
        self.allowed = AllowList(path)
        self.theirs = EnrolmentBook(path, lambda: self.now_s)
        self.ours = EnrolmentBook(path, lambda: self.now_s)

    def code(self, name: str = "kitchen", **options: object) -> EnrolCode:
        """Make a code as the operator does."""
        return self.theirs.make_code(name, ADDRESS, SERVER.public, **options)  # type: ignore[arg-type]

    def redeem(self, code: EnrolCode, key: str = ONE) -> str:
        """Redeem a code as the coordinator that serves does."""
        return self.ours.redeem(one_time_keys(code).public, key, self.allowed)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """An empty allow-list and an empty book."""
    return Desk(tmp_path)


def test_a_code_registers_one_key_once(desk: Desk) -> None:
    """The key is on the list at once; the same device may ask again, no other one."""
    code = desk.code()

    assert desk.redeem(code) == "kitchen"
    assert desk.allowed.devices() == {"kitchen": ONE}
    assert desk.redeem(code) == "kitchen"
    with pytest.raises(RefusedError, match="used already, by the key"):
        desk.redeem(code, TWO)
    assert desk.allowed.devices() == {"kitchen": ONE}


def test_a_code_that_was_used_brings_nobody_back(desk: Desk) -> None:
    """A device that was taken off the list stays off, with its old code and key as well."""
    code = desk.code()
    desk.redeem(code)
    desk.allowed.unregister("kitchen")

    with pytest.raises(RefusedError, match="used already"):
        desk.redeem(code)
    assert desk.allowed.devices() == {}


def test_a_code_expires(desk: Desk) -> None:
    """To the second, by the coordinator's clock; a clock that was set back is named."""
    code = desk.code(lasts_s=900.0)
    desk.now_s += 900.0
    with pytest.raises(RefusedError, match=r"expired 0 s ago by the coordinator's clock, .* 20"):
        desk.redeem(code)
    desk.now_s -= 3600.0
    with pytest.raises(RefusedError, match="was set back"):
        desk.redeem(code)
    assert desk.allowed.devices() == {}

    desk.now_s += 3599.0
    assert desk.redeem(code) == "kitchen"


def test_a_newer_code_makes_the_older_one_void(desk: Desk) -> None:
    """So does withdrawing it; a code of another device stays good."""
    old, other = desk.code(), desk.code("garage")
    new = desk.code()

    with pytest.raises(RefusedError, match="withdrawn, or a newer one"):
        desk.redeem(old)
    assert desk.theirs.withdraw("kitchen")
    assert not desk.theirs.withdraw("kitchen")
    with pytest.raises(RefusedError, match="withdrawn"):
        desk.redeem(new)
    assert desk.redeem(other) == "garage"


def test_a_name_that_is_taken_needs_replace(desk: Desk) -> None:
    """When the code is made, and again when it is redeemed."""
    early, garage = desk.code(), desk.code("garage")
    desk.allowed.register("kitchen", TWO)

    with pytest.raises(ConfigError, match="kitchen is registered already.*--replace"):
        desk.code()
    with pytest.raises(RefusedError, match="registered already, with another key"):
        desk.redeem(early)
    with pytest.raises(RefusedError, match="registered as 'kitchen' already"):
        desk.redeem(garage, TWO)
    assert desk.redeem(desk.code(replaces=True)) == "kitchen"
    assert desk.allowed.devices() == {"kitchen": ONE}
    assert desk.allowed.reload_if_changed(), "live sessions of the old key must end"


def test_a_name_that_is_taken_meanwhile_is_kept(desk: Desk) -> None:
    """The list is read under its lock: what another process has just registered stands."""
    code = desk.code()
    AllowList(desk.allowed.path).register("kitchen", TWO)

    with pytest.raises((RefusedError, ConfigError), match="registered already"):
        desk.redeem(code)
    assert AllowList(desk.allowed.path).devices() == {"kitchen": TWO}


def test_the_file_lets_nobody_in(desk: Desk) -> None:
    """It is its owner's alone and holds no secret, no code and no one-time key, but a hash."""
    code = desk.code()
    text, pair = desk.theirs.path.read_text(), one_time_keys(code)

    assert desk.theirs.path.stat().st_mode & 0o777 == 0o600
    for secret in (code.secret.hex(), pair.secret, pair.public, write_code(code)):
        assert secret not in text
    (row,) = json.loads(text)["codes"]
    assert len(bytes.fromhex(row["hash"])) == 32


def test_hashes_are_compared_in_constant_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hash in the book is compared, by `compare_digest`, whichever is found."""
    made = [desk.code(f"d{number}") for number in range(5)]
    seen: list[str] = []

    def compare(ours: str, theirs: str) -> bool:
        seen.append(ours)
        return ours == theirs

    monkeypatch.setattr(books.hmac, "compare_digest", compare)
    entry = desk.ours.find(one_time_keys(made[0]).public)

    assert entry is not None
    assert entry.name == "d0"
    assert len(seen) == len(made)


def test_the_one_time_key_becomes_no_device(desk: Desk) -> None:
    """A code whose own key was registered would be good for ever."""
    code = desk.code()

    with pytest.raises(RefusedError, match="that of a code"):
        desk.redeem(code, one_time_keys(code).public)
    assert desk.allowed.devices() == {}


@pytest.mark.parametrize("name", ["", "../x", "a b", "-", "x" * 65])
def test_no_code_for_what_is_no_name(desk: Desk, name: str) -> None:
    """A name becomes a folder, so that it is looked at before anything is printed."""
    with pytest.raises(ConfigError, match="device name"):
        desk.code(name)


@pytest.mark.parametrize("lasts_s", [0.0, -1.0, 8 * 86400.0, float("nan")])
def test_no_code_without_an_end(desk: Desk, lasts_s: float) -> None:
    """A code lasts for more than nothing and a week at most."""
    with pytest.raises(ConfigError, match="a code lasts"):
        desk.code(lasts_s=lasts_s)


def test_the_book_stays_small(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are over are forgotten, the oldest first; too many open ones are refused."""
    monkeypatch.setattr(books, "MOST_CLOSED", 3)
    monkeypatch.setattr(books, "MOST_OPEN", 4)
    first = desk.code()
    for _ in range(6):
        desk.code()
    rows = json.loads(desk.theirs.path.read_text())["codes"]
    assert [row["fate"] for row in rows] == ["withdrawn"] * 3 + ["open"]
    with pytest.raises(RefusedError, match="does not know this code"):
        desk.redeem(first)

    for name in ("a", "b", "c"):
        desk.code(name)
    with pytest.raises(ConfigError, match="wait for devices already"):
        desk.code("d")
    assert MOST_CLOSED >= 100


def test_while_another_process_writes_a_device_is_asked_to_wait(desk: Desk) -> None:
    """The thread that serves everybody waits for no lock, and the code is not spent."""
    code = desk.code()
    for name in ("devices.yaml.codes.lock", "devices.yaml.lock"):
        held = os.open(desk.allowed.path.with_name(name), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError):
            desk.redeem(code)
        os.close(held)

        assert desk.redeem(code) == "kitchen"
        desk.allowed.unregister("kitchen")
        code = desk.code()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_link_in_place_of_the_lock_gives_no_file_away(desk: Desk, tmp_path: Path) -> None:
    """Who owns the folder cannot have root hand over the file to which a link leads."""
    os.chown(tmp_path, 12345, 12345)
    target = tmp_path / "target"
    target.touch(0o600)
    (tmp_path / "devices.yaml.codes.lock").symlink_to(target)

    with pytest.raises(StorageError, match="symbolic links"):
        desk.code()

    assert target.stat().st_uid == 0


@pytest.mark.parametrize(
    "change",
    [
        {"hash": "\u00e9" * 64},
        {"hash": ["a"] * 64},
        {"hash": "a" * 63},
        {"until_s": "later"},
        {"until_s": float("nan")},
        {"until_s": 1e300},
        {"made_s": None},
        {"name": "../x"},
        {"name": 7},
        {"fate": "lost"},
        {"replaces": "no"},
        {"used_by": "x"},
        {"more": 1},
    ],
)
def test_a_code_that_somebody_has_changed_is_none(desk: Desk, change: dict[str, object]) -> None:
    """Whatever stands in the file: it lets nobody in, and ends no thread that serves others."""
    code = desk.code()
    rows = json.loads(desk.theirs.path.read_text())["codes"]
    desk.theirs.path.write_text(json.dumps({"codes": [{**rows[0], **change}]}))

    assert desk.ours.find(one_time_keys(code).public) is None
    with pytest.raises(ConfigError, match="is no book of codes"):
        desk.redeem(code)


def test_a_damaged_book_is_named_and_ends_no_run(desk: Desk) -> None:
    """Who makes a code is told; a coordinator that serves goes on with what it has read."""
    code = desk.code()
    key = one_time_keys(code).public
    assert desk.ours.find(key) is not None
    desk.theirs.path.write_text('{"codes": [{"name": "../x"}]}')

    assert desk.ours.find(key) is not None
    with pytest.raises(ConfigError, match="is no book of codes"):
        desk.code()


@dataclass
class Known:
    """What ought to be true of a code."""

    code: EnrolCode
    name: str
    until_s: float
    replaces: bool
    fate: str = "open"
    used_by: str = ""


class Ledger:
    """What ought to be true of all codes and devices, said in a few lines."""

    def __init__(self) -> None:
        self.devices: dict[str, str] = {}
        self.codes: list[Known] = []

    def made(self, known: Known) -> None:
        """A newer code makes an older one void."""
        for other in self.codes:
            if (other.name, other.fate) == (known.name, "open"):
                other.fate = "withdrawn"
        self.codes.append(known)

    def redeems(self, known: Known, key: str, now_s: float) -> bool:
        """Return whether *known* lets *key* in, and take note if it does."""
        owner = self.devices.get(known.name)
        if owner == key == known.used_by:
            return True
        others = (k for name, k in self.devices.items() if name != known.name)
        is_taken = owner not in (None, key) and not known.replaces
        if known.fate != "open" or now_s >= known.until_s or key in others or is_taken:
            return False
        known.fate, known.used_by, self.devices[known.name] = "used", key, key
        return True


@pytest.mark.parametrize("seed", range(8))
def test_in_whatever_order_each_code_lets_in_whom_it_should(tmp_path: Path, seed: int) -> None:
    """Made, used, used again, void, expired, replaced, taken away, restarted: as a model says."""
    draw, ledger, desk = random.Random(seed), Ledger(), Desk(tmp_path)
    names, keys = ("a", "b"), [make_key_pair().public for _ in range(3)]
    num_let_in = 0
    for _ in range(40):
        name, key, act = draw.choice(names), draw.choice(keys), draw.random()
        if act < 0.3:
            replaces, lasts_s = draw.random() < 0.5, draw.choice((10.0, 900.0))
            if name in ledger.devices and not replaces:
                with pytest.raises(ConfigError):
                    desk.code(name, lasts_s=lasts_s)
                continue
            code = desk.code(name, lasts_s=lasts_s, replaces=replaces)
            ledger.made(Known(code, name, desk.now_s + lasts_s, replaces))
        elif act < 0.8 and ledger.codes:
            known = draw.choice(ledger.codes[-4:])
            if ledger.redeems(known, key, desk.now_s):
                assert desk.redeem(known.code, key) == known.name
                num_let_in += 1
            else:
                with pytest.raises(RefusedError):
                    desk.redeem(known.code, key)
        elif act < 0.9 and name in ledger.devices:
            desk.allowed.unregister(name)
            del ledger.devices[name]
        elif act < 0.95:
            desk.now_s += draw.choice((1.0, 20.0))
        else:
            now_s, desk = desk.now_s, Desk(tmp_path)
            desk.now_s = now_s
        assert AllowList(desk.allowed.path).devices() == ledger.devices
    assert num_let_in


def test_of_many_at_once_one_gets_the_code(desk: Desk) -> None:
    """Coordinators and devices that share the files race for it; exactly one key is registered."""
    code, won = desk.code(), []
    one_time = one_time_keys(code).public

    def race(key: str) -> None:
        book = EnrolmentBook(desk.allowed.path, lambda: desk.now_s)
        allowed = AllowList(desk.allowed.path)
        for _ in range(2000):
            try:
                won.append((book.redeem(one_time, key, allowed), key))
            except StorageError:  # another one has the lock
                time.sleep(0.005)
                continue
            except RefusedError:
                pass
            return

    keys = [make_key_pair().public for _ in range(6)]
    threads = [threading.Thread(target=race, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert AllowList(desk.allowed.path).devices() == dict(won)

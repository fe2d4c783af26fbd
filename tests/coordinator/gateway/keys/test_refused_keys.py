"""Refused keys: an operator finds the one that is known, whoever else knocks."""

from __future__ import annotations

import json
import math
from pathlib import Path

from zmq.utils import z85

from coordinator.gateway.keys.refused_keys import (
    FRESH_S,
    MOST_EACH,
    MOST_KEYS,
    STALE_S,
    WRITE_S,
    RefusedKeys,
    read_refused,
)


def key(number: int) -> str:
    """A public key by its number."""
    return str(z85.encode(number.to_bytes(32, "big")).decode())


def saved(refused: RefusedKeys, now_s: float = 1e6) -> list[str]:
    """Write the list, and return the keys in its file."""
    refused.save(now_s, lambda _: False)
    return [one.key for one in read_refused(refused.path)]


def test_who_came_how_often_and_from_where(tmp_path: Path) -> None:
    """First and last time, number and address survive the coordinator's restart."""
    refused = RefusedKeys(tmp_path / "a.yaml")
    for clock_s in (10.0, 11.0, 15.0):
        refused.note(key(1), "10.0.0.1", clock_s)
    saved(refused)

    again = RefusedKeys(tmp_path / "a.yaml")
    again.note(key(1), "10.0.0.1", 20.0)
    saved(again)

    (one,) = read_refused(again.path)
    assert (one.source, one.first_s, one.last_s, one.times) == ("10.0.0.1", 10.0, 20.0, 4)
    assert again.path.stat().st_mode & 0o777 == 0o600


def test_one_address_pushes_out_only_its_own(tmp_path: Path) -> None:
    """Thousands of keys of one address leave those of others alone, and the file small."""
    refused = RefusedKeys(tmp_path / "a.yaml")
    refused.note(key(1), "10.0.0.1", 0.0)
    for number in range(2, 5000):
        refused.note(key(number), "10.0.0.66", 1.0)

    keys = saved(refused)

    assert key(1) in keys
    assert len(keys) == 1 + MOST_EACH
    assert keys[-1] == key(4999)


def test_many_addresses_push_out_none_that_came_lately(tmp_path: Path) -> None:
    """A full list of one key each takes no further one, until one is an hour old."""
    refused = RefusedKeys(tmp_path / "a.yaml")
    for number in range(5000):
        refused.note(key(number), f"10.0.{number >> 8}.{number & 255}", float(number) / 1000)
    assert saved(refused) == [key(number) for number in range(MOST_KEYS)]

    refused.note(key(9999), "10.9.9.9", FRESH_S + 1.0)

    keys = saved(refused, 2e6)
    assert key(9999) in keys
    assert key(0) not in keys
    assert len(keys) == MOST_KEYS
    assert refused.path.stat().st_size < 32 * 1024


def test_who_has_most_makes_room(tmp_path: Path) -> None:
    """In a full list a new address takes the place of the oldest key of whoever has most."""
    refused = RefusedKeys(tmp_path / "a.yaml")
    for number in range(MOST_KEYS):
        refused.note(key(number), f"10.0.0.{number // MOST_EACH}", 1.0)

    refused.note(key(500), "10.7.7.7", 2.0)

    keys = saved(refused)
    assert key(500) in keys
    assert len(keys) == MOST_KEYS


def test_what_is_registered_or_old_is_forgotten(tmp_path: Path) -> None:
    """A key that an operator has taken in is pending no more, nor is one of last week."""
    refused = RefusedKeys(tmp_path / "a.yaml")
    for number in range(3):
        refused.note(key(number), f"10.0.0.{number}", 0.0 if number else STALE_S)
    refused.note(key(3), "10.0.0.3", STALE_S + 1.0)

    refused.save(1e6, lambda known: known == key(3))

    assert [one.key for one in read_refused(refused.path)] == [key(0)]


def test_the_disk_is_written_seldom(tmp_path: Path) -> None:
    """However often a key comes, the file is written once in two seconds, and not at rest."""
    refused, at_s = RefusedKeys(tmp_path / "a.yaml"), 1e6
    refused.note(key(1), "10.0.0.1", 1.0)
    saved(refused, at_s)
    first = refused.path.stat().st_ino
    refused.note(key(2), "10.0.0.1", 2.0)

    assert saved(refused, at_s + WRITE_S / 2) == [key(1)]
    assert saved(refused, at_s + WRITE_S) == [key(1), key(2)]
    second = refused.path.stat().st_ino
    saved(refused, at_s + 100.0)
    assert refused.path.stat().st_ino == second != first


def test_a_damaged_file_or_a_full_disk_costs_this_list_alone(tmp_path: Path) -> None:
    """Nothing that stands in the file, or keeps it from being written, ends a run."""
    path = tmp_path / "a.yaml.refused"
    good = {"key": key(1), "source": "\x1b[2J10.0.0.1", "first_s": 1, "last_s": 2, "times": 3}
    for content in (b"\xff", b"[]", b'{"refused": 7}', b'{"refused": [{"key": 1}]}'):
        path.write_bytes(content)
        assert read_refused(path) == []
    for change in ({"last_s": 1e300}, {"first_s": math.nan}, {"times": math.nan}, {"times": "x"}):
        path.write_text(json.dumps({"refused": [{**good, **change}]}))
        assert read_refused(path) == []
    path.write_text(json.dumps({"refused": [{**good, "key": "no key"}, good]}))
    (one,) = read_refused(path)
    assert one.source == "?[2J10.0.0.1"

    path.unlink()
    path.mkdir()
    refused = RefusedKeys(tmp_path / "a.yaml")
    refused.note(key(1), "10.0.0.1", 1.0)
    refused.save(1e6, lambda _: False)

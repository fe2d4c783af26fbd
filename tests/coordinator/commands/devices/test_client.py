"""`coordinator client`: an operator lets in a key that was refused, and no other one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.commands.devices import client
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from coordinator.gateway.keys.refused_keys import RefusedKeys
from edge_sdk.transport.keys import fingerprint, make_key_pair

ONE, TWO, THREE = (make_key_pair().public for _ in range(3))


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """An allow-list of one device; two other keys were refused."""
    path = tmp_path / "devices.yaml"
    AllowList(path).register("one", ONE)
    refused = RefusedKeys(path)
    for clock_s in (0.0, 60.0, 120.0):
        refused.note(TWO, "10.0.0.2", clock_s)
    refused.note(THREE, "10.0.0.3", 7.0)
    refused.save(1e6, lambda _: False)
    return path


def test_what_was_refused_is_listed(devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fingerprint, key, address, how often and when, in lines of 80 columns; open codes, too."""
    EnrolmentBook(devices).make_code("kitchen", "tcp://10.0.0.1:7070", ONE)

    assert main(["client", "pending", "--allow-list", str(devices)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{fingerprint(TWO)}  3 times from 10.0.0.2"
    assert lines[1].startswith("    first 1970-01-01 ")
    assert lines[2] == f"    key {TWO}"
    assert lines[3] == f"{fingerprint(THREE)}  once from 10.0.0.3"
    assert lines[6].startswith("kitchen: a code is open until ")
    assert max(map(len, lines)) <= 80
    assert main(["client", "pending", "--format", "json", "--allow-list", str(devices)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["key"] for one in told["refused"]] == [TWO, THREE]
    assert [one["name"] for one in told["codes"]] == ["kitchen"]


@pytest.mark.parametrize("word", [TWO, fingerprint(TWO)], ids=["key", "fingerprint"])
def test_what_is_known_is_approved(
    devices: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its key or its fingerprint; then it is pending no more."""
    assert main(["client", "approve", "two", word, "--allow-list", str(devices)]) == 0

    assert AllowList(devices).devices() == {"one": ONE, "two": TWO}
    capsys.readouterr()
    main(["client", "pending", "--allow-list", str(devices)])
    assert TWO not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["two", ONE], "was refused lately"),
        (["two", fingerprint(TWO)[:9]], "was refused lately"),
        (["two", TWO[:39]], "was refused lately"),
        (["two", ""], "was refused lately"),
        (["one", TWO], "one is registered already"),
        (["../x", TWO], "device name"),
    ],
)
def test_what_is_not_known_is_not_approved(
    devices: Path, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No part of a key or fingerprint, no key that did not knock, no name that is taken."""
    assert main(["client", "approve", *words, "--allow-list", str(devices)]) == 2

    assert error in capsys.readouterr().err
    assert AllowList(devices).devices() == {"one": ONE}


def test_two_keys_with_one_fingerprint_need_the_whole_key(
    devices: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fingerprint is short enough for somebody to search for a second key with it."""
    monkeypatch.setattr(client, "fingerprint", lambda _: "1234:1234:1234:1234")

    words = ["client", "approve", "two", "1234:1234:1234:1234", "--allow-list", str(devices)]
    assert main(words) == 2

    assert "2 keys have the fingerprint" in capsys.readouterr().err
    assert AllowList(devices).devices() == {"one": ONE}


def test_a_taken_name_is_replaced_where_that_is_said(devices: Path) -> None:
    """A board with a new key keeps its name."""
    assert main(["client", "approve", "one", TWO, "--replace", "--allow-list", str(devices)]) == 0

    assert AllowList(devices).devices() == {"one": TWO}

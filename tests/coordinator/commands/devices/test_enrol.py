"""`coordinator enrol`: what is printed is a code for the coordinator that is meant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.commands.devices import enrol
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from edge_sdk.transport.enrol_code import one_time_keys, read_code
from edge_sdk.transport.keys import KeyPair, create_key_pair, fingerprint, make_key_pair

OWN = "10.1.2.3"


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyPair:
    """A folder with the coordinator's keys, on a machine with one address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(enrol, "_own_host", lambda: OWN)
    monkeypatch.setattr(enrol, "_is_served", lambda _: False)
    return create_key_pair("coordinator.key")


def write_run(**settings: Any) -> str:
    """Write the config of a run, and return its name."""
    Path("run.yaml").write_text(json.dumps({"model": "m", **settings}))
    return "run.yaml"


def test_a_person_gets_the_command_for_the_device(
    keys: KeyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    """A code for this machine's address and the coordinator's key, that the book knows."""
    assert main(["enrol", "kitchen"]) == 0

    out = capsys.readouterr().out
    found = re.search(r"^edge-sdk enrol (\S+)$", out, re.MULTILINE)
    assert found is not None
    code = read_code(found[1])
    assert (code.address, code.server_key) == (f"tcp://{OWN}:7070", keys.public)
    (entry,) = EnrolmentBook(Path("devices.yaml")).open_codes()
    assert entry.name == "kitchen"
    assert EnrolmentBook(Path("devices.yaml")).find(one_time_keys(code).public) == entry
    assert entry.until_s - entry.made_s == 900.0
    for words in (OWN, "this machine's; --address", fingerprint(keys.public), "Nobody listens at"):
        assert words in out
    assert max(len(line) for line in out.splitlines() if found[1] not in line) <= 80


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("tcp://*:7071", f"tcp://{OWN}:7071"),
        ("tcp://192.168.1.10:80", "tcp://192.168.1.10:80"),
        ("tcp://[::1]:7072", "tcp://[::1]:7072"),
    ],
)
def test_the_runs_config_names_port_key_and_list(
    keys: KeyPair, listen: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--config` is that of `coordinator serve`; nothing has to be said twice."""
    other = create_key_pair("other.key")
    config = write_run(listen=listen, secret_key="other.key", allow_list="list.yaml")

    assert main(["enrol", "kitchen", "--config", config, "--format", "json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["address"] == read_code(told["code"]).address == address
    assert told["server_key"] == other.public != keys.public
    assert [entry.name for entry in EnrolmentBook(Path("list.yaml")).open_codes()] == ["kitchen"]


def test_an_address_that_others_cannot_reach_is_named(
    keys: KeyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that listens on the loopback alone has boards on this machine alone."""
    config = write_run(listen="tcp://127.0.0.1:7070")

    assert main(["enrol", "kitchen", "--config", config]) == 0

    assert "(reached from this machine alone; --address names another)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["kitchen", "--address", "10.0.0.1"], "did you mean 'tcp://10.0.0.1:7070'"),
        (["kitchen", "--minutes", "0"], "a code lasts for more than 0 min"),
        (["kitchen", "--key", "nothing.key"], "cannot read key nothing.key"),
        (["kit chen"], "device name 'kit chen'"),
        (["taken"], "taken is registered already, with the key"),
        (["kitchen", "--config", "any-port.yaml"], "--address tcp://HOST:PORT says which"),
    ],
)
def test_no_code_for_what_cannot_be(
    keys: KeyPair, words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what is wrong, and no code is left in the book."""
    AllowList("devices.yaml").register("taken", make_key_pair().public)
    Path(write_run(listen="tcp://*:*")).rename("any-port.yaml")

    assert main(["enrol", *words]) == 2

    assert error in capsys.readouterr().err
    assert EnrolmentBook(Path("devices.yaml")).open_codes() == []


def test_a_code_can_be_withdrawn(keys: KeyPair, capsys: pytest.CaptureFixture[str]) -> None:
    """So that one that was shown to the wrong person is void at once."""
    main(["enrol", "kitchen"])
    capsys.readouterr()

    assert main(["enrol", "kitchen", "--withdraw"]) == 0
    assert capsys.readouterr().out == "the code of kitchen is void\n"
    assert EnrolmentBook(Path("devices.yaml")).open_codes() == []
    assert main(["enrol", "kitchen", "--withdraw"]) == 0
    assert capsys.readouterr().out == "kitchen has no open code\n"


def test_the_qr_code_is_the_code(
    keys: KeyPair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal of 80 columns, in black and white whatever its colours are."""
    segno = pytest.importorskip("segno")
    seen: list[str] = []
    make_qr = segno.make_qr
    monkeypatch.setattr(segno, "make_qr", lambda t, **kw: (seen.append(t), make_qr(t, **kw))[1])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    assert main(["enrol", "kitchen"]) == 0

    out = capsys.readouterr().out
    assert f"enrol {seen[0][:8]}-" in out
    assert read_code(seen[0]).address == f"tcp://{OWN}:7070"
    drawn = [line for line in out.splitlines() if "\u2580" in line or "\u2588" in line]
    assert len(drawn) >= 19
    for line in drawn:
        assert line.startswith("\x1b[97;40m")
        assert line.endswith("\x1b[0m")
        assert len(line) - len("\x1b[97;40m\x1b[0m") <= 80

"""Enrolment on the device: a key and a config are there afterwards, or nothing has changed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.enrolment_book import EnrolmentBook
from edge_sdk.cli import main
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.enrol import TEMPLATE, enrol
from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.transport.enrol_code import write_code
from edge_sdk.transport.keys import create_key_pair, fingerprint, load_key_pair, make_key_pair

# Its own letters would mean something to YAML.
SERVER = make_key_pair()


class Counter:
    """A coordinator that serves, and whoever makes codes beside it."""

    def __init__(self, gateway: ZmqGateway, allowed: AllowList) -> None:
        self.address, self.allowed = gateway.address, allowed

    def code(self, name: str = "kitchen", **options: object) -> str:
        """Return a code in letters."""
        book = EnrolmentBook(self.allowed.path)
        return write_code(book.make_code(name, self.address, SERVER.public, **options))  # type: ignore[arg-type]


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Counter]:
    """A coordinator with an empty allow-list."""
    (tmp_path / "there").mkdir()
    allowed = AllowList(tmp_path / "there" / "devices.yaml")
    config = GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER)
    with ZmqGateway(config, allowed) as gateway:
        yield Counter(gateway, allowed)


def test_a_new_device_has_all_that_a_run_needs(counter: Counter, tmp_path: Path) -> None:
    """A key of its own, 0600, and the commented config of `edge-sdk init` that names it."""
    config = tmp_path / "device.yaml"

    done = enrol(counter.code(), config)

    loaded = load_config(ClientConfig, config, env={})
    assert (loaded.coordinator, loaded.server_key) == (counter.address, SERVER.public)
    assert loaded.secret_key == tmp_path / "device.key" == done.key
    assert done.key.stat().st_mode & 0o777 == 0o600
    assert counter.allowed.devices() == {"kitchen": load_key_pair(done.key).public}
    assert (done.name, done.is_new_key, done.is_new_config) == ("kitchen", True, True)
    comments = [line for line in TEMPLATE.read_text().splitlines() if line.startswith("#")]
    text = config.read_text()
    assert all(line.replace("examples/device.yaml", str(config)) in text for line in comments)
    assert "where this device is kitchen" in text


CONFIG = """\
# my own
coordinator: "tcp://10.0.0.1:80"  # the old one
server_key: '{-:#'
secret_key: keys/mine.key
data: {path: a.jsonl}   # server_key: not this
threads: 3
"""


def test_a_config_that_is_there_keeps_the_rest(counter: Counter, tmp_path: Path) -> None:
    """Key, data, comments and order stay; coordinator and its key are new, and are named."""
    config = tmp_path / "device.yaml"
    config.write_text(CONFIG)
    config.chmod(0o640)
    pair = create_key_pair(tmp_path / "keys" / "mine.key")

    done = enrol(counter.code(), config)

    assert counter.allowed.devices() == {"kitchen": pair.public}
    assert (done.is_new_key, done.is_new_config) == (False, False)
    assert set(done.changed) == {"coordinator", "server_key"}
    before, after = CONFIG.splitlines(), config.read_text().splitlines()
    assert after[1] == f"coordinator: {counter.address}  # the old one"
    assert [line for line in after if line not in before] == after[1:3]
    assert yaml.safe_load(config.read_text())["server_key"] == SERVER.public
    assert config.stat().st_mode & 0o777 == 0o640
    assert enrol(counter.code(replaces=True), config).changed == ()


def test_a_link_to_a_config_stays_one(counter: Counter, tmp_path: Path) -> None:
    """What is changed is the file that it leads to."""
    real, link = tmp_path / "real.yaml", tmp_path / "device.yaml"
    real.write_text(CONFIG)
    link.symlink_to(real)

    enrol(counter.code(), link)

    assert link.is_symlink()
    assert load_config(ClientConfig, real, env={}).coordinator == counter.address


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "threads: 2", "coordinator:\n"])
def test_what_a_config_lacks_is_added(counter: Counter, tmp_path: Path, text: str) -> None:
    """Also to an empty one, and to one without a line end."""
    config = tmp_path / "device.yaml"
    config.write_text(text)

    enrol(counter.code(), config)

    loaded = load_config(ClientConfig, config, env={})
    assert (loaded.coordinator, loaded.server_key) == (counter.address, SERVER.public)
    assert loaded.threads == (2 if "threads" in text else None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{coordinator: tcp://a:1, server_key: x}", "only you can change it; set coordinator"),
        ("coordinator: >\n  tcp://a:1\nserver_key: x\n", "only you can change it"),
        ("- a\n", "not a list of settings"),
        ("a: [\n", "line 2: not YAML"),
    ],
)
def test_what_cannot_be_changed_safely_costs_no_code(
    counter: Counter, tmp_path: Path, text: str, error: str
) -> None:
    """The device is told before the code is used, and neither key nor config has changed."""
    config, code = tmp_path / "device.yaml", counter.code()
    config.write_text(text)

    with pytest.raises(ConfigError, match=error):
        enrol(code, config)

    assert config.read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["device.yaml", "there"]
    config.unlink()
    assert enrol(code, config).name == "kitchen"


def test_a_config_that_is_no_text_costs_no_code(counter: Counter, tmp_path: Path) -> None:
    """A folder, or bytes of something else, in its place are named before anything is asked."""
    code = counter.code()
    (tmp_path / "device.yaml").write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match="cannot read .*device.yaml: not UTF-8"):
        enrol(code, tmp_path / "device.yaml")
    with pytest.raises(ConfigError, match="cannot read .*: Is a directory"):
        enrol(code, tmp_path)

    assert counter.allowed.devices() == {}


def test_a_code_that_is_refused_leaves_no_config(counter: Counter, tmp_path: Path) -> None:
    """The key stays for the next try; a mistyped code leaves nothing at all."""
    code, config = counter.code(), tmp_path / "device.yaml"
    with pytest.raises(ConfigError, match="letters where"):
        enrol(code[:-1], config)
    assert sorted(os.listdir(tmp_path)) == ["there"]
    enrol(code, tmp_path / "other" / "device.yaml")

    with pytest.raises(RefusedError, match="used already"):
        enrol(code, config)

    assert not config.exists()
    public = load_key_pair(tmp_path / "device.key").public
    assert enrol(counter.code("garage"), config).public_key == public


def test_a_key_elsewhere_is_named_in_the_config(counter: Counter, tmp_path: Path) -> None:
    """`--key` may name any file; the config finds it from its own folder."""
    config, key = tmp_path / "etc" / "device.yaml", tmp_path / "keys" / "k.key"

    enrol(counter.code(), config, key)

    assert load_config(ClientConfig, config, env={}).secret_key == key
    assert yaml.safe_load(config.read_text())["secret_key"] == str(key)


def test_a_key_that_others_can_read_is_not_enrolled(counter: Counter, tmp_path: Path) -> None:
    """It is no secret any more, and the code is not spent on it."""
    code = counter.code()
    create_key_pair(tmp_path / "device.key")
    (tmp_path / "device.key").chmod(0o644)

    with pytest.raises(ConfigError, match="can be read by others"):
        enrol(code, tmp_path / "device.yaml")

    (tmp_path / "device.key").chmod(0o600)
    assert enrol(code, tmp_path / "device.yaml").name == "kitchen"


def test_the_command_takes_what_a_person_gives_it(
    counter: Counter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On standard input, alone or with all that was printed beside it; in several words; twice."""
    monkeypatch.chdir(tmp_path)
    code = counter.code()
    printed = f"On the device:\n\nedge-sdk enrol {code}\n\naddress  {counter.address}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(printed))

    assert main(["enrol", "-"]) == 0

    public = load_key_pair("device.key").public
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"enrolled as kitchen at {counter.address}"
    assert told[1] == f"key:    device.key (made), fingerprint {fingerprint(public)}"
    assert told[2] == "config: device.yaml (new)"
    assert max(map(len, told)) <= 80
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{code.lower()}\n"))
    assert main(["enrol", "-"]) == 0
    assert main(["enrol", *code.split("-")]) == 0
    assert "config: device.yaml (as it was)" in capsys.readouterr().out
    assert counter.allowed.devices() == {"kitchen": public}


@pytest.mark.parametrize("word", ["0" * 5000, "", "hello"])
def test_the_command_ends_with_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And with 2, whatever it is given in place of a code."""
    assert main(["enrol", word]) == 2

    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_tunnel_is_another_way_to_the_same_coordinator(counter: Counter, tmp_path: Path) -> None:
    """The address may be another one than in the code; the key that is asked for is the code's."""
    book = EnrolmentBook(counter.allowed.path)
    code = write_code(book.make_code("kitchen", "tcp://10.255.255.1:7070", SERVER.public))
    config = tmp_path / "device.yaml"

    assert main(["enrol", code, "--config", str(config), "--coordinator", counter.address]) == 0

    assert load_config(ClientConfig, config, env={}).coordinator == counter.address
    with pytest.raises(ConfigError, match="must be tcp://HOST:PORT"):
        enrol(code, config, address="somewhere")


@pytest.mark.parametrize("example", ["examples/device.yaml", "examples/jetson/device.yaml"])
def test_the_examples_can_be_enrolled(counter: Counter, tmp_path: Path, example: str) -> None:
    """As their pages say: the example is put in its place, and the code fills in two settings."""
    text = (Path(__file__).parents[2] / example).read_text(encoding="utf-8")
    config = tmp_path / "device.yaml"
    config.write_text(text)

    done = enrol(counter.code(), config, tmp_path / "device.key")

    assert set(done.changed) <= {"coordinator", "server_key", "secret_key"}
    loaded = load_config(ClientConfig, config, env={})
    assert (loaded.coordinator, loaded.server_key) == (counter.address, SERVER.public)
    before, after = text.splitlines(), config.read_text(encoding="utf-8").splitlines()
    assert len([line for line in after if line not in before]) <= 3

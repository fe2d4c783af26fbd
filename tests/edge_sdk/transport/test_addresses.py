"""Addresses: what can be dialled, what can be listened at, and what was meant by the rest."""

from __future__ import annotations

import pytest

from coordinator.config.run import ServeConfig
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import (
    WebAddress,
    check_dialled,
    check_listened,
    parse_address,
    web_address,
)

MEANT = {
    "192.168.1.10:7070": "tcp://192.168.1.10:7070",
    "kitchen.local": "tcp://kitchen.local:7070",
    "tcp://kitchen": "tcp://kitchen:7070",
    "http://kitchen:80/": "tcp://kitchen:80",
    "tcp:kitchen:80": "tcp://kitchen:80",
    "[::1]:7070": "tcp://[::1]:7070",
}
HOPELESS = ["tcp://kitchen:99999", "tcp://a b:1", "tcp://::1:7070", "", "tcp://*:7070"]


@pytest.mark.parametrize("address", MEANT)
def test_what_was_meant_is_said(address: str) -> None:
    """An address without `tcp://` or port is refused by the config with the one that works."""
    with pytest.raises(ConfigError, match="override coordinator: coordinator must be") as refused:
        load_config(ClientConfig, None, [f"coordinator={address}", "server_key=x"], env={})

    assert f"did you mean '{MEANT[address]}'?" in str(refused.value)
    assert parse_address(MEANT[address]) is not None
    check_dialled("coordinator", MEANT[address])


@pytest.mark.parametrize("address", HOPELESS)
def test_what_cannot_be_dialled_is_refused(address: str) -> None:
    """Key and value stand in the line, and nothing is guessed where nothing is clear."""
    with pytest.raises(ValueError, match=r"key must be tcp://HOST:PORT"):
        check_dialled("key", address)

    assert parse_address(address) is None


@pytest.mark.parametrize("address", ["*:7070", "7070", "tcp://*", "tcp://*:99999"])
def test_a_coordinator_listens_at_an_address_too(address: str) -> None:
    """`listen` is refused by the same rule, with its own key."""
    with pytest.raises(ValueError, match=r"listen must be tcp://\*:PORT"):
        ServeConfig(model="x", listen=address)


@pytest.mark.parametrize("address", ["tcp://*:7070", "tcp://127.0.0.1:*", "tcp://[::]:0"])
def test_any_interface_and_any_port_can_be_listened_at(address: str) -> None:
    """As ZeroMQ writes them; a device could dial none of the first two."""
    check_listened("listen", address)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:7071", "127.0.0.1", 7071),
        ("http://localhost:80/", "localhost", 80),
        ("[::1]:7071", "::1", 7071),
        ("127.0.0.2:0", "127.0.0.2", 0),
    ],
)
def test_this_machine_needs_no_token(text: str, host: str, port: int) -> None:
    """What nobody else can reach is taken as it stands."""
    assert web_address("page", text, has_token=False) == (host, port)


@pytest.mark.parametrize(
    "text", ["0.0.0.0:7071", "*:7071", "[::]:7071", "192.168.1.4:7071", "lab:1"]
)
def test_others_need_a_token(text: str) -> None:
    """Where others can reach the page it must be said who may look; with a token it may listen."""
    with pytest.raises(ValueError, match="others can reach"):
        web_address("page", text, has_token=False)

    assert web_address("page", text, has_token=True).port in (7071, 1)


@pytest.mark.parametrize("text", ["7071", "localhost", "tcp://*:7071", "host:99999", "a b:1", ""])
def test_what_is_no_address_is_said(text: str) -> None:
    """The line names the key, and how an address looks."""
    with pytest.raises(ValueError, match=r"page must be HOST:PORT, as 127\.0\.0\.1:7071"):
        web_address("page", text, has_token=True)


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1:7071", True),
        ("localhost:7071", True),
        ("localhost", True),
        ("LOCALHOST:9464", True),
        ("[::1]:7071", True),
        ("evil.example:7071", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
    ],
)
def test_only_our_own_names_lead_here(host: str, is_ours: bool) -> None:
    """A name of another site that points to this machine is refused."""
    assert WebAddress("127.0.0.1", 7071).is_named_by(host) == is_ours

"""Addresses: what can be dialled, what can be listened at, and what was meant by the rest."""

from __future__ import annotations

import pytest

from coordinator.config.run import ServeConfig
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import check_dialled, check_listened, parse_address

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

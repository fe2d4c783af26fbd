"""What keeps a coordinator from listening is known before it reads a model."""

from __future__ import annotations

import socket

import pytest

from coordinator.gateway.port import obstacle, require_free_port
from edge_sdk.errors import ConfigError


def test_a_port_is_taken_while_somebody_listens_there() -> None:
    """It is told who could be asked for it, and is free again afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"in use; ss -ltnp 'sport = :\d+' shows who"):
            require_free_port(address)

    require_free_port(address)


@pytest.mark.parametrize("listen", ["tcp://*:*", "tcp://127.0.0.1:*", "tcp://no-such-interface:1"])
def test_what_cannot_be_known_is_no_obstacle(listen: str) -> None:
    """A port that the system chooses, or an interface, is left to the gateway itself."""
    assert obstacle(listen) is None


def test_an_address_of_another_host_is_an_obstacle() -> None:
    """Nobody listens for somebody else."""
    with pytest.raises(ConfigError, match="cannot listen at tcp://192.0.2.1:7070: "):
        require_free_port("tcp://192.0.2.1:7070")

"""A gateway that listens, and its two devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.transport.keys import make_key_pair

SERVER, ONE, TWO = make_key_pair(), make_key_pair(), make_key_pair()


@pytest.fixture
def allowed(tmp_path: Path) -> AllowList:
    """Two devices, `one` and `two`."""
    both = AllowList(tmp_path / "allowed.json")
    both.register("one", ONE.public)
    both.register("two", TWO.public)
    return both


@pytest.fixture
def gateway(allowed: AllowList) -> Iterator[ZmqGateway]:
    """An open gateway."""
    with ZmqGateway(GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER), allowed) as opened:
        yield opened

"""What is kept of a session: nothing once it is over, however it has ended."""

from __future__ import annotations

import gc
import time

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Joined
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.sessions import DeviceSession
from edge_sdk.deadline import Deadline
from edge_sdk.protocol.messages import Pause, Stamp
from tests.coordinator.gateway.conftest import ONE, SERVER, TWO
from tests.coordinator.gateway.test_gateway import RawDevice, open_link, until

TIMES = 4


def kept() -> int:
    """Count the sessions that are over and still in memory."""
    gc.collect()
    return sum(
        type(found) is DeviceSession and found.is_over and found.name in ("one", "two")
        for found in gc.get_objects()
    )


def test_nothing_holds_a_session_that_is_over(allowed: AllowList) -> None:
    """Devices may leave and come back, with a goodbye or without a word: no old session stays."""
    config = GatewayConfig(address="tcp://127.0.0.1:*", keys=SERVER, silent_after_s=2.0)

    with ZmqGateway(config, allowed) as gateway:
        for _ in range(TIMES):
            device = RawDevice(gateway, ONE)
            until(gateway, Joined)
            device.close()
            for _ in range(5):  # the coordinator finds out that nobody is there, and keeps this
                gateway.send("one", Pause(stamp=Stamp()))
                time.sleep(0.05)
            with open_link(gateway, TWO):
                until(gateway, Joined)
        with RawDevice(gateway, ONE):
            until(gateway, Joined)
            deadline = Deadline.after(20.0)
            while kept() and not deadline.has_passed():
                gateway.events(0.2)

            assert kept() == 0

"""Strangers cannot fill the log: a few lines a minute, and one that counts the rest."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from coordinator.gateway.allow_list import ZAP_DOMAIN, AllowList, ZapHandler
from coordinator.gateway.ration import MOST_LINES, PERIOD_S, Ration
from edge_sdk.transport.keys import make_key_pair


def test_what_is_new_is_told_and_the_rest_counted() -> None:
    """Each thing once, few things in all; then a period later the sum, and it begins anew."""
    ration = Ration()

    assert [ration.may_tell("a", 0.0), ration.may_tell("a", 1.0)] == [True, False]
    assert sum(ration.may_tell(str(number), 2.0) for number in range(100)) == MOST_LINES - 1
    assert ration.sum_up(PERIOD_S - 1.0) == 0
    assert ration.sum_up(PERIOD_S) == 1 + 100 - (MOST_LINES - 1)
    assert ration.sum_up(2 * PERIOD_S) == 0
    assert ration.may_tell("a", 2 * PERIOD_S)
    assert ration.sum_up(3 * PERIOD_S) == 0


def test_a_thousand_strange_keys_make_a_handful_of_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every try is answered, few are told, the rest is one number."""
    keys = [z85.decode(make_key_pair().public) for _ in range(20)]
    with zmq.Context() as context:
        zap = ZapHandler(context, AllowList(tmp_path / "a.json"))
        with context.socket(zmq.DEALER) as asker, caplog.at_level(logging.WARNING):
            asker.connect("inproc://zeromq.zap.01")
            for number in range(1000):
                address = f"10.0.0.{number % 200}".encode()
                question = [b"1.0", b"id", ZAP_DOMAIN.encode(), address, b"", b"CURVE"]
                asker.send_multipart([b"", *question, keys[number % len(keys)]])
                zap.answer_all()
                assert asker.recv_multipart()[3] == b"400"
            zap.sum_up(float("inf"))
        zap.close()

    assert len(caplog.messages) == MOST_LINES + 1
    assert caplog.messages[-1] == f"device.refused_again tries={1000 - MOST_LINES}"

"""Peers cannot fill the log: a line each for a kind of trouble, and one that counts the rest."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from coordinator.gateway.keys.allow_list import AllowList
from coordinator.gateway.keys.zap import ZAP_DOMAIN, ZapHandler
from coordinator.gateway.ration import (
    MOST_LINES,
    MOST_LINES_EACH,
    PERIOD_S,
    Bucket,
    Trouble,
    source_of,
)
from edge_sdk.errors import MAX_TEXT
from edge_sdk.transport.keys import make_key_pair


def test_a_source_gets_a_line_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind of trouble once, then a period later the number; and it begins anew."""
    trouble = Trouble()

    assert [trouble.tell("a.b", "x", "why", at) for at in (0.0, 1.0, 2.0)] == [True, False, False]
    trouble.sum_up(PERIOD_S - 1.0)
    assert caplog.messages == ["a.b source=x why"]
    trouble.sum_up(PERIOD_S)
    assert caplog.messages[1:] == ["a.b source=x again=2"]
    trouble.sum_up(2 * PERIOD_S)
    assert trouble.tell("a.b", "x", "why", 2 * PERIOD_S)
    assert len(caplog.messages) == 3


def test_one_source_cannot_take_the_lines_of_another(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it does, it gets few of them."""
    trouble = Trouble()

    told = [trouble.tell(f"a.b{number}", "x", "", 0.0) for number in range(100)]

    assert sum(told) == MOST_LINES_EACH
    assert trouble.tell("a.b", "y", "", 0.0)


def test_ten_thousand_sources_make_few_lines_and_need_no_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All that is kept of most of them is their number."""
    trouble = Trouble()

    for number in range(10_000):
        trouble.tell("a.b", f"10.0.{number >> 8}.{number & 255}", "", 0.0)
    trouble.sum_up(PERIOD_S)

    assert len(caplog.messages) == MOST_LINES + 1
    assert caplog.messages[-1] == f"gateway.trouble others={10_000 - MOST_LINES}"


def test_a_text_of_a_peer_is_cut_and_cleaned(caplog: pytest.LogCaptureFixture) -> None:
    """No escape sequence, no false line, no megabyte."""
    Trouble().tell("a.b", "x", "\x1b[2J\nfalse line" + "y" * 100_000, 0.0)

    [line] = caplog.messages
    assert line.isprintable()
    assert len(line) < MAX_TEXT + 50


def test_a_bucket_gives_what_it_has_and_fills_again() -> None:
    """So much at once, so much a second; a large request empties it and is granted once."""
    bucket = Bucket(3.0, 0.5)

    assert [bucket.take(1.0, 10.0) for _ in range(5)] == [True, True, True, False, False]
    assert [bucket.take(1.0, 12.0), bucket.take(1.0, 13.0)] == [True, False]
    assert bucket.take(100.0, 1000.0)
    assert not bucket.take(1.0, 1001.0)


def test_a_thousand_strange_keys_make_a_line_for_each_address(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every try is answered; an address gets one line a minute, and one with its number."""
    keys = [z85.decode(make_key_pair().public) for _ in range(20)]
    trouble = Trouble()
    with zmq.Context() as context:
        zap = ZapHandler(context, AllowList(tmp_path / "a.json"), trouble)
        with context.socket(zmq.DEALER) as asker, caplog.at_level(logging.WARNING):
            asker.connect("inproc://zeromq.zap.01")
            for number in range(1000):
                address = f"10.0.0.{number % 4}".encode()
                question = [b"1.0", b"id", ZAP_DOMAIN.encode(), address, b"", b"CURVE"]
                asker.send_multipart([b"", *question, keys[number % len(keys)]])
                zap.answer_all()
                assert asker.recv_multipart()[3] == b"400"
            trouble.sum_up(float("inf"))
        zap.close()

    assert len(caplog.messages) == 8
    assert caplog.messages[-1] == "device.refused source=10.0.0.3 again=249"


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("?:", "?:"),
    ],
)
def test_a_network_of_ipv6_is_one_source(address: str, source: str) -> None:
    """Whoever has one address there has 2^64."""
    assert source_of(address) == source

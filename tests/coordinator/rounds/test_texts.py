"""What a device writes into a message does nothing to a terminal, a log or a file of the run."""

from __future__ import annotations

import dataclasses
import io
import itertools
import logging
import random
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.results.console import Console
from coordinator.results.watchers import Watchers
from edge_sdk.command import CleanFormatter
from edge_sdk.errors import MAX_TEXT, LocalProtocolError, RemoteProtocolError
from edge_sdk.protocol import headers, packets
from edge_sdk.protocol.messages import FROM_DEVICE
from edge_sdk.protocol.packets import CONTROL_FRAMES
from tests.coordinator.rounds import siege
from tests.coordinator.rounds.siege import TEXTS, besieged, drawn_case, extreme, run_under_siege

NASTY = [text for text in TEXTS if not text.isprintable() or len(text) > MAX_TEXT]


def texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a dataclass, its names of entries as well."""
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from texts_in(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(texts_in, (*value, *value.values())))
    elif isinstance(value, tuple):
        yield from itertools.chain.from_iterable(map(texts_in, value))


def holds_texts(kind: type) -> bool:
    """Whether a message of *kind* has a text that may be anything."""
    return any("str" in str(hint) for hint in typing.get_type_hints(kind).values())


def assert_clean(text: str) -> None:
    """A text is one line of no great length that only shows itself."""
    assert text.isprintable(), ascii(text)
    assert len(text) <= MAX_TEXT


@pytest.mark.parametrize("kind", FROM_DEVICE)
def test_no_message_brings_a_text_that_is_more_than_text(kind: type) -> None:
    """Whatever field it is in, also of messages that are yet to be written: it arrives clean."""
    draw, num_read = random.Random(0), 0
    for _ in range(300):
        try:
            found, _ = headers.decode_header(headers.encode_header(extreme(draw, kind)))
        except (LocalProtocolError, RemoteProtocolError):
            continue  # a field has a form, and the text has not
        num_read += 1
        for text in texts_in(found):
            assert_clean(text)
    assert num_read or not holds_texts(kind) or "stamp" in kind.__annotations__


@pytest.mark.parametrize("kind", CONTROL_FRAMES.values())
def test_no_control_frame_does(kind: type) -> None:
    """Names of telemetry and what an SDK calls itself are cleaned as well."""
    draw = random.Random(0)
    for _ in range(50):
        try:
            frame = packets.control_frame(extreme(draw, kind))
            found = packets.read_control(packets.read_packet(memoryview(frame)))
        except (LocalProtocolError, RemoteProtocolError):
            continue
        for text in texts_in(found):
            assert_clean(text)


def test_nothing_reaches_a_screen_a_log_or_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run under siege writes printable lines only: console, log at its most, files."""
    written = io.StringIO()
    handler, log = logging.StreamHandler(written), logging.getLogger()
    handler.setFormatter(CleanFormatter())
    monkeypatch.setattr(siege, "Watchers", lambda: Watchers([Console(99)]))
    served = besieged("server-gathered", tmp_path)
    capsys.readouterr()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        for seed in range(4):
            cases = map(drawn_case, range(1000 * seed, 1000 * seed + 200))
            (tmp_path / str(seed)).mkdir()
            run_under_siege(served, tmp_path / str(seed), cases)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)

    console = capsys.readouterr().err
    assert "m1" in console
    assert "device.refused" in written.getvalue()
    lines = [*console.split("\n"), *written.getvalue().split("\n")]
    for path in tmp_path.glob("*/run/*.jsonl"):
        lines += path.read_text(encoding="ascii").split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert [line for line in written.getvalue().split("\n") if len(line) > 2 * MAX_TEXT] == []


@pytest.mark.parametrize("text", NASTY)
def test_a_log_line_stays_one_line(text: str) -> None:
    """Neither a message nor an error in a traceback can begin another line of the log."""
    try:
        raise ValueError(text)
    except ValueError as error:
        record = logging.LogRecord(
            "a", 30, "b", 1, "got %s", (text,), (ValueError, error, error.__traceback__)
        )
    line, *traceback = CleanFormatter().format(record).split("\n")

    assert line.isprintable()
    assert all(one.isprintable() and one.startswith("  ") for one in traceback)

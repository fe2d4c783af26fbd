"""The process in which a coordinator's chat template runs: rows in, segments out, nothing else.

A template is a program. The sandbox keeps it from our objects, not from using up memory and time,
also inside one operation such as `'a' * 10**10`, which nobody could stop in a thread. Here the
kernel does: memory of the process, processor time of a row, no file that can be written.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, BinaryIO

from edge_sdk.data.chats import chat_samples
from edge_sdk.data.encoding import Segment
from edge_sdk.data.rows import DataConfig, Row
from edge_sdk.data.templates import ChatTemplate
from edge_sdk.errors import ConfigError, DataError

# Address space of this process, a multiple of what jinja2 and a chat take (26 MiB before any row).
MEMORY_BYTES = 512 << 20
# Processor time for the samples of one row. Honest ones take milliseconds, also on a small board.
ROW_S = 10.0


def bind() -> None:
    """Take the bounds upon us, before anything of the template is read."""
    with suppress(ValueError, OSError):  # macOS knows no such bound
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer each chunk of rows with a line for each of them."""
    about = json.loads(source.readline())
    config = DataConfig(**about["config"])
    tokenizer = SimpleNamespace(**about["tokenizer"])
    signal.setitimer(signal.ITIMER_PROF, ROW_S)
    try:
        template: Any = ChatTemplate(tokenizer, about["variables"])
    except ConfigError as error:
        template = error
    while line := source.readline():
        for row in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, ROW_S)
            sink.write(json.dumps(_answer(row, template, config)).encode() + b"\n")
            sink.flush()


def _answer(row: dict[str, Any], template: Any, config: DataConfig) -> dict[str, Any]:
    """Return what became of a row: its samples, or the error that refuses it."""
    if isinstance(template, ConfigError):
        return {"config": str(template)}
    lists: dict[str, Any] = {name: tuple(row[name]) for name in ("messages", "targets", "tools")}
    try:
        samples, is_shortened = chat_samples(
            Row(schema="chat", where=row["where"], asked=row["asked"], **lists), template, config
        )
    except DataError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"{row['where']}: the chat template takes too much memory"}
    written = [[[part.text, part.targets] for part in sample] for sample in samples]
    return {"samples": written, "shortened": is_shortened}


def read_answer(line: bytes) -> tuple[list[list[Segment]], bool]:
    """Return the samples of a row, as `_answer` has written them.

    Raises:
        DataError: the row is refused.
        ConfigError: every row would be.
    """
    found = json.loads(line)
    if "config" in found:
        raise ConfigError(found["config"])
    if "error" in found:
        raise DataError(found["error"])
    samples = [
        [Segment(text, tuple((start, stop) for start, stop in targets)) for text, targets in sample]
        for sample in found["samples"]
    ]
    return samples, found["shortened"]


def main() -> None:
    """Serve the process that has started this one."""
    bind()
    serve(sys.stdin.buffer, sys.stdout.buffer)

"""Samples of chats by a template that nobody here has written: made in a bounded process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from edge_sdk.data.encoding import Segment
from edge_sdk.data.isolated.child import MEMORY_BYTES, ROW_S, read_answer
from edge_sdk.data.rows import DataConfig, Row
from edge_sdk.deadline import Deadline
from edge_sdk.errors import ConfigError, DataError

# Seconds until a row's answer must be here: its processor time, on a machine that does much else.
ANSWER_S = 6 * ROW_S
# The answer of one row: more than its process could make of its memory.
MAX_ANSWER_BYTES = MEMORY_BYTES
# Isolated: no site, no user's folder, no environment; it finds what this process finds.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edge_sdk.data.isolated.child import main; main()"
)
Made = tuple[list[list[Segment]], bool]


class IsolatedChats:
    """Makes the samples of chats in a process of its own, which lives from the first row on."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self._about = {
            "tokenizer": {
                "chat_template": getattr(tokenizer, "chat_template", None),
                "special_tokens_map": dict(tokenizer.special_tokens_map),
            },
            "variables": dict(config.chat_template_kwargs),
            "config": {"answers": config.answers, "system_turn": config.system_turn},
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._left = b""

    def __call__(self, rows: Sequence[Row]) -> Iterator[Made | DataError]:
        """Yield samples of each row and whether an answer was shortened, or why it has none.

        Raises:
            DataError: the template has used up its memory or its time.
            ConfigError: it has no such variable.
        """
        process = self._process or self._start()
        self._send(process, [_plain(row) for row in rows])
        for row in rows:
            line = self._answer(process, row.where)
            try:
                yield read_answer(line)
            except DataError as error:
                yield error

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise ConfigError(
                "chat_template: this program has no Python to run the coordinator's template in; "
                "let data.chat_template name a file of your own"
            )
        command = [sys.executable, "-I", "-S", "-c", _START, json.dumps(sys.path)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
        )
        self._send(self._process, self._about)
        return self._process

    def _send(self, process: subprocess.Popen[bytes], what: Any) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(what, default=str).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # whoever waits for its answer finds out

    def _answer(self, process: subprocess.Popen[bytes], where: str) -> bytes:
        """Return the next line of the process."""
        assert process.stdout is not None
        deadline, pieces, size = Deadline.after(ANSWER_S), [self._left], len(self._left)
        while b"\n" not in pieces[-1]:
            ready, _, _ = select.select([process.stdout], [], [], deadline.left_s())
            piece = os.read(process.stdout.fileno(), 1 << 20) if ready else b""
            size += len(piece)
            if not piece or size > MAX_ANSWER_BYTES:
                self.close()
                raise DataError(
                    f"{where}: the chat template takes more than {ROW_S:.0f} s or "
                    f"{MEMORY_BYTES >> 20} MiB for one row; let data.chat_template name another"
                )
            pieces.append(piece)
        line, _, self._left = b"".join(pieces).partition(b"\n")
        return line


def _plain(row: Row) -> dict[str, Any]:
    return {
        "where": row.where,
        "messages": row.messages,
        "targets": row.targets,
        "tools": row.tools,
        "asked": row.asked,
    }

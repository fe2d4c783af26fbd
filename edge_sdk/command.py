"""What the command lines share: errors to exit codes, Ctrl-C, and libraries that stay quiet.

Loads none of these libraries: what they read when they are imported is set beforehand.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from edge_sdk.errors import (
    INTERRUPTED_EXIT_CODE,
    EdgeError,
    as_edge_error,
    one_line,
    printable,
    public_text,
)
from edge_sdk.files import PRIVATE, storage_errors
from edge_sdk.home import lend_home
from profiler import completion

# What is set already stays: a person can still ask for all of it.
SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def quiet_libraries() -> None:
    """Turn off progress bars, advice and warnings of the libraries below us."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if "transformers" in sys.modules:  # too late for the environment
        from transformers.utils import logging as transformers_logging

        logging: Any = transformers_logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()


log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_on_signals(stop: Callable[[], None], within_s: float | None = None) -> Iterator[None]:
    """Ask to stop at the first Ctrl-C or SIGTERM, and leave at once at the second.

    Python hears signals in its main thread only: elsewhere nothing changes.

    Args:
        stop: Asks to stop, and returns at once.
        within_s: Seconds after which to leave at once, whatever is still being done; None: when
            that is done. For what a kill at any moment does not harm.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False
    end = threading.Timer(within_s or 0.0, _leave_at_once)
    end.daemon = True

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(INTERRUPTED_EXIT_CODE)
        asked = True
        stop()
        if within_s is not None:
            end.start()

    previous = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        yield
    finally:
        end.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave_at_once() -> None:
    """End the program in the middle of whatever it does."""
    sys.stderr.write("stopped in the middle of what was being done\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED_EXIT_CODE)


class CleanFormatter(logging.Formatter):
    """Writes a record in lines of which none moves the cursor, or passes for another record."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Return the line of a record."""
        record.message = public_text(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """Return a traceback, each of its lines behind the margin."""
        return "\n".join(
            f"  {printable(line)}" for line in super().formatException(ei).splitlines()
        )


def add_log_level(parser: argparse.ArgumentParser) -> None:
    """Add the options for the version, how much of the log is shown, and where."""
    parser.add_argument("-V", "--version", action="version", version=metadata.version("edgesplit"))
    parser.add_argument(
        "--log-level", default="warning", choices=("debug", "info", "warning", "error")
    )
    parser.add_argument(
        "--log-file",
        type=Path,
        metavar="FILE",
        help="add the log, at least of the level info, to this file of its owner alone",
    )


def _start_log(level: str, file: Path | None) -> None:
    """Show the log from *level* on; a *file* gets all from the level info on as well.

    Raises:
        StorageError: the file cannot be written.
    """
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(CleanFormatter())
    handlers: list[logging.Handler] = [shown]
    if file is not None:
        with storage_errors(f"--log-file {file}"):
            handlers.append(_LogFile(file))
        shown.setLevel(level)
        level = min(level, "INFO", key=logging.getLevelName)
    logging.basicConfig(level=level, handlers=handlers)


class _LogFile(logging.FileHandler):
    """A file that its owner alone can read; where the disk is full, the program goes on."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(CleanFormatter())

    def _open(self) -> Any:
        return open(self.baseFilename, "a", encoding="utf-8", opener=_private)  # noqa: SIM115


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, PRIVATE)


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse *arguments* and call their `run`; return the exit code of the program.

    An error of ours becomes one line on standard error and the exit code of its class; so does any
    other, whose traceback is in the log from the level info on.
    """
    completion.answer(parser)
    options = parser.parse_args(arguments)
    if options.log_level != "debug":
        quiet_libraries()
    try:
        _start_log(options.log_level.upper(), options.log_file)
        if (lent := lend_home(os.environ)) is not None:
            log.info("home.lent folder=%s", lent)
        code: int = options.run(options)
    except EdgeError as error:
        sys.stderr.write(f"{parser.prog}: {one_line(error)}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except Exception as error:  # noqa: BLE001 - a person gets one line of it, the log the rest
        log.info("program.failed", exc_info=error)
        ended = as_edge_error(error)
        sys.stderr.write(f"{parser.prog}: {one_line(ended)}\n")
        return ended.exit_code
    return code

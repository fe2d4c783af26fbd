"""Keep libraries from talking into a program's own lines; for command lines, never for libraries.

Loads none of them: what they read when they are imported is set beforehand.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edge_sdk.errors import INTERRUPTED_EXIT_CODE

# A person can still ask for all of it: what is set already stays.
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


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks to stop, the second leaves at once."""
    asked = False

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(INTERRUPTED_EXIT_CODE)
        asked = True
        stop()

    previous = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

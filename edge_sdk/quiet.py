"""Keep libraries from talking into a program's own lines; for command lines, never for libraries.

Loads none of them: what they read when they are imported is set beforehand.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

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

"""What a shell is told when somebody presses Tab: by argcomplete, where it asks and is installed.

    eval "$(register-python-argcomplete coordinator)"

Costs nothing else: without the shell's question in the environment nothing is imported.
"""

from __future__ import annotations

import argparse
import os
import sys

ASKED = "_ARGCOMPLETE"
"""Set by the shell's side of argcomplete."""


def is_asked() -> bool:
    """Whether a shell wants to know how a line can go on, and nothing else."""
    return ASKED in os.environ


def answer(parser: argparse.ArgumentParser) -> None:
    """Tell the shell how its line can go on, and end the program; do nothing if it has not asked.

    An action's `completer`, where there is one, is asked for its values; else file names are.
    """
    if not is_asked():
        return
    try:
        import argcomplete
    except ModuleNotFoundError:  # the shell was prepared by another environment
        sys.exit(1)
    argcomplete.autocomplete(parser, always_complete_options="long")

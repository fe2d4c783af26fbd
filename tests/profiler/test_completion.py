"""Tab completes our commands in a shell that has been told of them, and costs nothing elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("argcomplete")
BIN = Path(sys.executable).parent
# As `bash` calls the function that register-python-argcomplete defines.
PRESS_TAB = """
eval "$(register-python-argcomplete coordinator edge-sdk profiler)"
read -r -a COMP_WORDS <<< "$1"
COMP_LINE="$1" COMP_POINT=${#1} COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_TYPE=9
_python_argcomplete "${COMP_WORDS[0]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def press_tab(line: str, folder: Path) -> list[str]:
    """Return what a bash offers for a line."""
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", PRESS_TAB, "bash", line],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return [word.strip() for word in done.stdout.split("\n") if word.strip()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("profiler measure --dt", {"--dtype"}),
        ("coordinator serve --preset hs", {"hsplitlora"}),
        ("coordinator serve --config run.yaml labels=de", {"device"}),
        ("edge-sdk run --config dev", {"device.yaml"}),
        ("edge-sdk run threads=2 data.path=tr", {"train.jsonl"}),
    ],
)
def test_a_shell_completes_commands(line: str, words: set[str], tmp_path: Path) -> None:
    """Options, methods, settings with their values in any place, and file names."""
    for name in ("device.yaml", "train.jsonl"):
        (tmp_path / name).touch()

    assert set(press_tab(line, tmp_path)) == words


def test_nothing_is_imported_that_nobody_asks_for() -> None:
    """Without a shell's question in the environment a start is as fast as without argcomplete."""
    code = "import sys; from edge_sdk.cli import main\ntry: main(['--version'])\n" + (
        "except SystemExit: pass\nprint('argcomplete' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "_ARGCOMPLETE"}

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "False"

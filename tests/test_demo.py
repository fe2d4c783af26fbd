"""The demo, as a person would start it, with few steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_sdk.deadline import Deadline
from tests.e2e.programs import Program

ROOT = Path(__file__).parents[1]
SHORT = ("--rounds", "1", "--steps", "2")


def command(out: Path, *arguments: str) -> list[str]:
    """Start the demo's program; scripts/demo adds only the virtual environment."""
    program = str(ROOT / "examples" / "demo" / "main.py")
    return [sys.executable, program, "--out", str(out), *SHORT, *arguments]


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that mention *folder*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(folder) in text:
            found.append(text)
    return found


@pytest.mark.parametrize("script", ["scripts/demo"])
def test_the_script_can_be_started(script: str) -> None:
    """The script is executable and a plain shell understands it."""
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["sh", "-n", str(ROOT / script)], check=True)


def test_the_demo_runs_twice_into_one_folder(tmp_path: Path) -> None:
    """A run over an older one ends with both tables, both texts and an adapter."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".edgesplit-demo").touch()
    (out / "left-over").touch()
    rows = [{"mr": f"n[{i}]", "ref": f"It is number {i}, and that is all."} for i in range(60)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    flags = ("--data", str(data), "--columns", "prompt=mr,completion=ref")
    result = subprocess.run(command(out, *flags), capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    assert not (out / "left-over").exists()
    tables = result.stdout[: result.stdout.index("Above: ")].splitlines()
    assert "plain PEFT" in result.stdout
    assert max(map(len, tables)) <= 80
    assert "device-3, private" in result.stdout
    assert "\n  after " in result.stdout
    assert "device-2: step 2/2" in result.stderr
    assert (out / "runs" / "demo" / "adapter" / "adapter_model.safetensors").is_file()
    assert processes_of(out) == []


def test_somebodys_folder_is_left_alone(tmp_path: Path) -> None:
    """A folder that is not from a demo is not cleared."""
    (tmp_path / "thesis.txt").touch()

    program = Program("python", *command(tmp_path)[1:], cwd=ROOT)

    assert program.wait() == 1
    assert program.text.startswith("demo: ")
    assert "choose another" in program.text
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks into /proc")
def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    """Stopped while its processes start, the demo ends with 130 and takes them along."""
    out = tmp_path / "out"
    demo = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    assert demo.stderr is not None
    while "keys made" not in demo.stderr.readline():
        assert demo.poll() is None
    deadline = Deadline.after(40.0)
    while len(processes_of(out)) < 5:  # itself, the coordinator and three devices
        assert deadline.left_s()
        time.sleep(0.02)

    demo.send_signal(signal.SIGINT)
    rest = demo.communicate(timeout=40)[1]

    assert demo.returncode == 130
    assert rest.endswith("demo: stopped\n")
    assert processes_of(out) == []

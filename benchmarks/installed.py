"""What an installed EdgeSplit takes on a device: space on disk, time and memory of its import."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from report import table

ROOT = Path(__file__).parents[1]

IMPORT = """
import time
began, used = time.perf_counter(), time.process_time()
import edge_sdk
wall = time.perf_counter() - began
from edge_sdk import ClientConfig, EdgeClient
all_wall, all_cpu = time.perf_counter() - began, time.process_time() - used
rss = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")]
print(wall, all_wall, all_cpu, rss[0])
"""


def sizes() -> str:
    """What a fresh environment takes, and what the import costs there."""
    rows, imports = [], ""
    plain = (str(ROOT), "onnxruntime")
    for what, packages, alone, target in (
        ("edgesplit", (str(ROOT),), (), "90"),
        ("edgesplit and onnxruntime", plain, (), "180"),
        ("edgesplit[onnx]: tokenizers, safetensors and jinja2 too", (f"{ROOT}[onnx]",), (), ""),
        (
            "the same, tokenizers without its hub client",
            (*plain, "safetensors", "jinja2"),
            ("tokenizers",),
            "",
        ),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            python = Path(scratch) / "bin" / "python"
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", scratch], check=True)
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
            subprocess.run([*pip, *packages], check=True)
            if alone:
                subprocess.run([*pip, "--no-deps", *alone], check=True)
            rows.append((what, f"{folder_mb(Path(scratch)):.0f}", target))
            imports = imports or import_cost(python)
    return "\n\n".join(
        [
            "## Installed size\n\nA fresh virtual environment without pip, compiled files "
            "included (MB).",
            table(("what", "MB", "target"), rows),
            imports,
        ]
    )


def folder_mb(folder: Path) -> float:
    """What the files of a folder take on disk."""
    return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()) / 1e6


def import_cost(python: Path) -> str:
    """Time and memory of importing the SDK in fresh processes."""
    found = []
    for _ in range(15):
        out = subprocess.run(
            [python, "-c", IMPORT], capture_output=True, text=True, check=True, cwd="/"
        )
        found.append([float(word) for word in out.stdout.split()])
    wall, whole, cpu, rss = (sorted(column) for column in zip(*found, strict=True))
    return (
        f"15 fresh processes, median (best): `import edge_sdk` {1e3 * wall[7]:.0f} "
        f"({1e3 * wall[0]:.0f}) ms; with `EdgeClient`, which loads the rest, {1e3 * whole[7]:.0f} "
        f"({1e3 * whole[0]:.0f}) ms, {1e3 * cpu[7]:.0f} ms of them CPU, and {rss[7] / 1024:.0f} "
        "MiB. Targets: 150 ms, 45 MB."
    )

"""Boards as trees of files, with what NVML answers on them: what their kernels show, in small.

`BOARDS` has them all; `build` writes one to a folder, which then is the root for a `Sources`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiler.sensors.sources import Nvml, Sources
from tests.boards.computers import CONTAINER_V1, CONTAINER_V2, RASPBERRY_PI_5, RTX_LAPTOP
from tests.boards.jetsons_nvgpu import AGX_ORIN_JP5, NANO_JP4, XAVIER_NX_JP5
from tests.boards.jetsons_nvml import ORIN_NANO_JP6, THOR_JP7
from tests.boards.tree import Board, write

BOARDS: dict[str, Board] = {
    "orin_nano_jp6": ORIN_NANO_JP6,
    "agx_orin_jp5": AGX_ORIN_JP5,
    "xavier_nx_jp5": XAVIER_NX_JP5,
    "nano_jp4": NANO_JP4,
    "thor_jp7": THOR_JP7,
    "raspberry_pi_5": RASPBERRY_PI_5,
    "rtx_laptop": RTX_LAPTOP,
    "container_v2": CONTAINER_V2,
    "container_v1": CONTAINER_V1,
}


@dataclass(frozen=True)
class Standing:
    """A board that has been built."""

    sources: Sources
    root: Path
    board: Board = field(repr=False)

    def write(self, files: dict[str, str | None]) -> None:
        """Let some files say something else from now on."""
        write(self.root, files)


def build(name: str, root: Path, library: Any = None) -> Standing:
    """Write the board called *name* to *root*; *library* stands in for its NVML."""
    board = BOARDS[name]
    write(root, board.files)
    nvml = Nvml(library if library is not None else board.nvml, visible="0")
    return Standing(Sources(root, nvml), root, board)

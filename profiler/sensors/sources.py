"""Where readings come from: a tree of files, NVML, torch where a program uses it already.

Only importer of pynvml, and the one door to it. What is asked stands with the quantities
(`board.py`, `load.py`, `power.py`, `heat.py`, `memory.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from profiler.sensors.kernel_files import find

ROOT = Path("/")
# A firmware that does not answer must not stop whoever wants to know the temperature.
COMMAND_TIMEOUT_S = 2.0


class Nvml:
    """NVIDIA's library, every failure of which is None.

    Whether it works is decided call by call: on a Jetson with JetPack 6 it starts, counts one GPU,
    tells its name, and answers NotSupported to everything else.

    Args:
        library: A module in the place of pynvml, for tests.
        visible: Which GPUs CUDA shows to this process; None reads CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, library: Any = None, visible: str | None = None) -> None:
        self._given = library
        self._visible = visible
        self._library: Any = None
        self._handle: Any = None
        self._pid = 0  # nothing of NVML survives a fork

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return what the function *name* answers about the GPU in use; None if it cannot."""
        self._open()
        return None if self._handle is None else self._call(name, self._handle, *arguments)

    def constant(self, name: str) -> Any:
        """Return a constant of the library; None where it has none of that name."""
        self._open()
        return getattr(self._library, name, None)

    def _call(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._library, name, None)
        if function is None:
            return None
        try:
            return function(*arguments)
        except self._library.NVMLError:
            return None

    def _open(self) -> None:
        if self._pid == os.getpid():
            return
        self._pid, self._handle = os.getpid(), None
        self._library = self._given if self._given is not None else _pynvml()
        if self._library is None:
            return
        try:
            self._library.nvmlInit()
        except self._library.NVMLError:
            return
        self._handle = self._first_visible()

    def _first_visible(self) -> Any:
        """Return the handle of torch's `cuda:0`; None where CUDA is shown no GPU."""
        visible = self._visible
        if visible is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        first = visible.split(",")[0].strip()
        if first.isdigit():
            return self._call("nvmlDeviceGetHandleByIndex", int(first))
        if first.startswith("GPU-"):
            return self._call("nvmlDeviceGetHandleByUUID", first)
        return None  # empty and -1 hide all of them


def _pynvml() -> ModuleType | None:
    try:
        import pynvml  # from nvidia-ml-py; the wheel named pynvml is another, deprecated one
    except ImportError:
        return None
    module: ModuleType = pynvml
    return module


@dataclass(frozen=True)
class Sources:
    """What readings are taken from."""

    root: Path = ROOT
    """Folder that holds /proc, /sys and /etc; another folder stands for another machine."""
    nvml: Nvml = field(default_factory=Nvml)
    cuda: Any = None
    """A module in the place of torch.cuda, for tests."""

    def loaded_cuda(self) -> Any:
        """Return torch.cuda if this process computes with it already, else None.

        Asking torch first would create a CUDA context: hundreds of MB on a board that has four GB.
        """
        if self.cuda is not None or self.root != ROOT:
            return self.cuda
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        return cuda if cuda is not None and cuda.is_initialized() else None

    def vcgencmd(self, *arguments: str) -> str | None:
        """Return what the firmware of a Raspberry Pi answers; None where there is none."""
        for program in find(self.root, "usr/bin/vcgencmd", "opt/vc/bin/vcgencmd"):
            try:
                answer = subprocess.run(
                    [str(program), *arguments],
                    capture_output=True,
                    text=True,
                    timeout=COMMAND_TIMEOUT_S,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError):
                return None
            return answer.stdout
        return None


HERE = Sources()
"""This machine."""

"""NVML in several states. Names, constants and errors are those of the real pynvml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml


class FakeNvml:
    """A module in the place of pynvml.

    Args:
        answers: What functions return; all others say NotSupported.
        error: Code with which everything fails, initialisation included.
        is_lost: Whether the GPU has fallen off the bus after initialisation.
    """

    def __init__(
        self, answers: dict[str, Any] | None = None, *, error: int = 0, is_lost: bool = False
    ) -> None:
        self.answers, self.error, self.is_lost = answers or {}, error, is_lost
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)  # what pynvml has not, nobody may ask for
        return self._function(name) if name.startswith("nvml") else real

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*_arguments: Any) -> Any:
            self.asked.append(name)
            if self.error:
                raise pynvml.NVMLError(self.error)
            if name == "nvmlInit":
                return None
            if self.is_lost:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
            if name == "nvmlDeviceGetHandleByIndex":
                return "handle"
            if name not in self.answers:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self.answers[name]

        return call


def no_library() -> FakeNvml:
    """No driver, or one without NVML: JetPack 4 and 5, Raspberry Pi, a container without GPU."""
    return FakeNvml(error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def stub(name: str, **answers: Any) -> FakeNvml:
    """A library that starts and knows next to nothing: JetPack 6 and 7."""
    return FakeNvml({"nvmlDeviceGetName": name, **answers})


def lost() -> FakeNvml:
    """A GPU that has fallen off the bus."""
    return FakeNvml(is_lost=True)

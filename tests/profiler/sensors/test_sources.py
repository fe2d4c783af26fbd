"""The doors: NVML in its several states, torch that is loaded or not, the Pi's firmware."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from profiler.sensors import sources as door
from profiler.sensors.load import gpu_load
from profiler.sensors.memory_budget import gpu_memory
from profiler.sensors.readings import Reading, unknown
from profiler.sensors.sources import Nvml, Sources
from tests.boards.nvml import FakeNvml, lost, no_library, stub

ERRORS = [getattr(pynvml, name) for name in dir(pynvml) if name.startswith("NVML_ERROR_")]


@pytest.mark.parametrize("library", [no_library(), lost(), stub("Orin (nvgpu)")])
def test_every_failure_is_none(library: FakeNvml) -> None:
    """Without the library, without the GPU and without support a question has no answer."""
    assert Nvml(library).ask("nvmlDeviceGetPowerUsage") is None


@pytest.mark.parametrize("code", ERRORS)
def test_no_error_of_nvml_gets_out(code: int) -> None:
    """Whatever number NVML fails with, at the first call or a later one."""
    late = FakeNvml({"nvmlDeviceGetName": "GPU"})
    nvml = Nvml(late)

    assert Nvml(FakeNvml(error=code)).ask("nvmlDeviceGetName") is None
    assert nvml.ask("nvmlDeviceGetName") == "GPU"
    late.error = code
    assert nvml.ask("nvmlDeviceGetName") is None


def test_an_old_library_lacks_functions() -> None:
    """A function that this version of pynvml has not is one that does not answer."""
    library = SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda _number: "handle",
    )

    assert Nvml(library).ask("nvmlDeviceGetTemperatureV", 0) is None


def test_the_wheel_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvidia-ml-py there are no readings from NVML, and no error."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert Nvml().ask("nvmlDeviceGetName") is None
    assert Nvml().constant("NVML_CLOCK_GRAPHICS") is None


def test_nvml_is_opened_once_and_again_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """One initialisation for a process; a child of it needs its own."""
    library = stub("GPU")
    nvml = Nvml(library)
    nvml.ask("nvmlDeviceGetName")
    nvml.ask("nvmlDeviceGetName")
    assert library.asked.count("nvmlInit") == 1

    monkeypatch.setattr(os, "getpid", lambda: -1)
    nvml.ask("nvmlDeviceGetName")

    assert library.asked.count("nvmlInit") == 2


@pytest.mark.parametrize(
    ("visible", "question", "argument"),
    [
        ("0", "nvmlDeviceGetHandleByIndex", 0),
        ("2,1", "nvmlDeviceGetHandleByIndex", 2),
        ("GPU-1b2c,0", "nvmlDeviceGetHandleByUUID", "GPU-1b2c"),
        ("", None, None),
        ("-1", None, None),
    ],
)
def test_the_gpu_is_the_one_that_cuda_shows(
    visible: str, question: str | None, argument: Any
) -> None:
    """CUDA_VISIBLE_DEVICES decides which GPU is asked; hidden GPUs are not."""
    handles: list[tuple[str, Any]] = []
    library = SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda n: handles.append(("nvmlDeviceGetHandleByIndex", n)),
        nvmlDeviceGetHandleByUUID=lambda n: handles.append(("nvmlDeviceGetHandleByUUID", n)),
    )

    Nvml(library, visible=visible).ask("nvmlDeviceGetName")

    assert handles == ([] if question is None else [(question, argument)])


def test_torch_is_asked_only_where_it_computes_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA context is never created for the sake of a reading."""
    cuda = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))

    assert Sources().loaded_cuda() is None
    cuda.is_initialized = lambda: True
    assert Sources().loaded_cuda() is cuda
    monkeypatch.delitem(sys.modules, "torch")
    assert Sources().loaded_cuda() is None


@pytest.mark.parametrize("is_integrated", [False, True])
def test_torch_comes_after_nvml(tmp_path: Path, is_integrated: bool) -> None:
    """Where NVML fails, torch tells the GPU's memory, unless it is the CPU's."""
    cuda = SimpleNamespace(
        get_device_properties=lambda _number: SimpleNamespace(
            name="GPU", is_integrated=is_integrated
        ),
        mem_get_info=lambda _number: (3, 8),
    )
    total, available = gpu_memory(Sources(tmp_path, Nvml(no_library()), cuda))

    assert total == (unknown("B") if is_integrated else Reading(8, "torch", "B"))
    assert available == (unknown("B") if is_integrated else Reading(3, "torch", "B"))


def test_a_node_that_appears_late_is_found(tmp_path: Path) -> None:
    """Files are looked for at every question: a driver may be loaded after us."""
    sources = Sources(tmp_path, Nvml(no_library()))
    before = gpu_load(sources)
    (tmp_path / "sys/devices/gpu.0").mkdir(parents=True)
    (tmp_path / "sys/devices/gpu.0/load").write_text("500\n")

    assert (before.value, gpu_load(sources).value) == (None, 50.0)


@pytest.mark.parametrize(
    "program", ["#!/bin/sh\nexit 255\n", "#!/bin/sh\nsleep 5\n", "#!/no/such/shell\n"]
)
def test_a_firmware_that_does_not_answer_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    """A vcgencmd that fails, hangs or cannot run has no answer."""
    monkeypatch.setattr(door, "COMMAND_TIMEOUT_S", 0.2)
    path = tmp_path / "usr/bin/vcgencmd"
    path.parent.mkdir(parents=True)
    path.write_text(program)
    path.chmod(0o755)

    assert Sources(tmp_path).vcgencmd("get_throttled") is None

"""What a board is, where `test_boards.py` has no board for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from profiler.sensors.board import (
    board,
    compute_capability,
    cpu_bf16,
    jetpack,
    l4t,
    native_bf16,
    power_mode,
    unified_memory,
)
from profiler.sensors.readings import Fact, no_fact
from profiler.sensors.sources import Nvml, Sources
from tests.boards import build
from tests.boards.nvml import no_library, stub
from tests.boards.tree import Files, write


def machine(root: Path, files: Files) -> Sources:
    """A machine without NVML."""
    write(root, files)
    return Sources(root, Nvml(no_library()))


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("R32 (release), REVISION: 7.6", "4.6"),
        ("R35 (release), REVISION: 6.1", "5.1.5"),
        ("R36 (release), REVISION: 4.0", "6.1"),
        ("R36 (release), REVISION: 4.7", "6.2.1"),
        ("R38 (release), REVISION: 4.0", "7.1"),
        ("R39 (release), REVISION: 2.0", "7.2"),
        ("R99 (release), REVISION: 1.0", None),
    ],
)
def test_the_release_of_l4t_is_a_jetpack(tmp_path: Path, release: str, expected: str) -> None:
    """The most special entry of the table counts; a release after it is unknown."""
    sources = machine(tmp_path, {"etc/nv_tegra_release": f"# {release}, GCID: 1\n"})

    assert jetpack(sources).value == expected


def test_in_a_container_the_package_tells_the_release(tmp_path: Path) -> None:
    """Without /etc/nv_tegra_release the installed package has the version."""
    status = (
        "Package: other\nStatus: install ok installed\nVersion: 9.9\n\n"
        "Package: nvidia-l4t-core\nStatus: install ok installed\nArchitecture: arm64\n"
        "Version: 36.4.3-20250107174145\n"
    )
    sources = machine(tmp_path, {"var/lib/dpkg/status": status})

    assert l4t(sources) == Fact("36.4.3", "/var/lib/dpkg/status nvidia-l4t-core")
    assert jetpack(sources).value == "6.2"


def test_a_mode_without_a_name_has_its_number(tmp_path: Path) -> None:
    """A container often has the status and not the table of names."""
    sources = machine(tmp_path, {"var/lib/nvpmodel/status": "pmode:0002 fmode:cool\n"})

    assert power_mode(sources) == Fact("mode 2", "/var/lib/nvpmodel/status")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("TNSPEC 3834-300-0008-J.0-1-0-jetson-agx-thor-devkit-", "Jetson (T5000)"),
        ("TNSPEC 3834-100-0000-A.0-1-0-jetson-agx-thor-t4000-", "Jetson (T4000)"),
        ("TNSPEC 3834-100-0099-A.0-1-0-other-", "Jetson"),
        ("", "Jetson"),
    ],
)
def test_thor_is_told_by_its_module(tmp_path: Path, spec: str, expected: str) -> None:
    """Both versions have one name; the boot configuration knows the module."""
    files: Files = {
        "proc/device-tree/model": "Jetson\0",
        "proc/device-tree/compatible": "nvidia,tegra264\0",
        "etc/nv_boot_control.conf": f"{spec}\n",
    }

    assert board(machine(tmp_path, files)).value == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((5, 3), False), ((7, 5), False), ((8, 0), True), ((8, 7), True), ((12, 1), True)],
)
def test_emulated_bfloat16_does_not_count(
    tmp_path: Path, capability: tuple[int, int], expected: bool
) -> None:
    """Only Ampere and later multiply bfloat16, whatever torch is able to emulate."""
    nvml = Nvml(stub("GPU", nvmlDeviceGetCudaComputeCapability=capability))

    assert native_bf16(Sources(tmp_path, nvml)).value is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags : fpu avx512_bf16", True),
        ("flags : fpu amx_bf16", True),
        ("Features : fp asimd bf16", True),
        ("Features : fp asimd asimdhp", False),
        ("nothing : here", None),
    ],
)
def test_a_processor_has_instructions_or_not(tmp_path: Path, line: str, expected: bool) -> None:
    """Both families of processors list them, under different names."""
    assert cpu_bf16(machine(tmp_path, {"proc/cpuinfo": line + "\n"})).value is expected


def test_a_gpu_that_cannot_tell_its_memory_shares_it(tmp_path: Path) -> None:
    """GB10 is no Tegra, and answers NotSupported when asked for its memory."""
    sources = Sources(tmp_path, Nvml(stub("NVIDIA GB10")))

    assert unified_memory(sources) == Fact(True, "NVML memory info")


def test_torch_tells_where_nvml_does_not(tmp_path: Path) -> None:
    """A program that computes on the GPU already knows its capability."""
    cuda = SimpleNamespace(get_device_capability=lambda _number: (8, 9))

    found = compute_capability(Sources(tmp_path, Nvml(no_library()), cuda))

    assert found == Fact("8.9", "torch")


def test_nothing_known_is_no_fact(tmp_path: Path) -> None:
    """A root without files answers no question, and names no source."""
    sources = machine(tmp_path, {})

    assert board(sources) == l4t(sources) == power_mode(sources) == no_fact()


def test_a_changed_mode_is_read_again(tmp_path: Path) -> None:
    """Nothing is remembered from one question to the next."""
    standing = build("orin_nano_jp6", tmp_path)
    before = power_mode(standing.sources).value
    standing.write({"var/lib/nvpmodel/status": "pmode:0002 fmode:cool\n"})

    assert (before, power_mode(standing.sources).value) == ("25W", "MAXN_SUPER")

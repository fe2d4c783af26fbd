"""What this machine is: board, SoC, JetPack, power mode, GPU and what its hardware can compute.

Only names and properties; how much of it there is and what it does now is elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from profiler.sensors.kernel_files import read_text, read_words
from profiler.sensors.readings import Fact, no_fact
from profiler.sensors.sources import HERE, Sources

# The release of L4T decides the JetPack; the longest beginning that fits counts.
JETPACKS = {
    "32.7": "4.6",
    "34": "5.0",
    "35.1": "5.0.2",
    "35.2": "5.1",
    "35.3": "5.1.1",
    "35.4": "5.1.2",
    "35.5": "5.1.3",
    "35.6.0": "5.1.4",
    "35.6.1": "5.1.5",
    "35.6.2": "5.1.5",
    "35.6": "5.1.6",
    "36.2": "6.0",
    "36.3": "6.0",
    "36.4": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39": "7.2",
}
# Compute capability of the GPU in each Tegra, where NVML does not tell.
TEGRA_CAPABILITY = {
    "tegra210": "5.3",
    "tegra186": "6.2",
    "tegra194": "7.2",
    "tegra234": "8.7",
    "tegra264": "11.0",
}
# The first generation (Ampere) that multiplies bfloat16 itself. Before, torch emulates it, slowly,
# and `torch.cuda.is_bf16_supported()` says True all the same.
BF16_SINCE = (8, 0)
# All Thor boards have one name; the module's number in the device tree or in the boot configuration
# tells the versions apart.
THOR_MODULES = {"0008": "T5000", "0000": "T4000"}


def board(sources: Sources = HERE) -> Fact:
    """Return the name of the board, from the device tree or, on a PC, from its maker."""
    model = read_text(sources.root / "proc/device-tree/model")
    if model is not None:
        version, where = _thor_version(sources), "/proc/device-tree/model"
        return Fact(f"{model} ({version})" if version else model, where)
    folder = sources.root / "sys/class/dmi/id"
    names = [read_text(folder / name) for name in ("sys_vendor", "product_name")]
    known = " ".join(name for name in names if name)
    return Fact(known, "/sys/class/dmi/id") if known else no_fact()


def _thor_version(sources: Sources) -> str | None:
    for name in ("proc/device-tree/compatible", "etc/nv_boot_control.conf"):
        match = re.search(r"3834-(?:[^-\s]*-)?(\d{4})", read_text(sources.root / name) or "")
        if match:
            return THOR_MODULES.get(match[1])
    return None


def soc(sources: Sources = HERE) -> Fact:
    """Find the chip: `tegra234`, `bcm2712`; on a PC the name of its processor."""
    compatible = read_words(sources.root / "proc/device-tree/compatible")
    # From the special to the general: the board first, its chip last, or before its family.
    chips = [name.split(",")[-1] for name in compatible]
    if chips:
        tegra = [name for name in chips if re.fullmatch(r"tegra\d+", name)]
        return Fact((tegra or chips)[-1], "/proc/device-tree/compatible")
    model = _cpuinfo(sources, "model name")
    return Fact(model, "/proc/cpuinfo") if model else no_fact()


def is_tegra(sources: Sources = HERE) -> bool:
    """Return whether this is a Jetson: one memory for both, CPU and GPU."""
    return str(soc(sources).value).startswith("tegra")


def l4t(sources: Sources = HERE) -> Fact:
    """Return the release of Linux for Tegra, such as `36.4.3`."""
    release = read_text(sources.root / "etc/nv_tegra_release") or ""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if match:
        return Fact(f"{match[1]}.{match[2]}", "/etc/nv_tegra_release")
    packages = read_text(sources.root / "var/lib/dpkg/status") or ""
    match = re.search(
        r"^Package: nvidia-l4t-core\n(?:\S.*\n| .*\n)*?Version: ([\d.]+)", packages, re.M
    )
    return Fact(match[1], "/var/lib/dpkg/status nvidia-l4t-core") if match else no_fact()


def jetpack(sources: Sources = HERE) -> Fact:
    """Return the version of JetPack, by its release of Linux for Tegra."""
    release = l4t(sources).value
    if not isinstance(release, str):
        return no_fact()
    parts = release.split(".")
    for length in range(len(parts), 0, -1):
        found = JETPACKS.get(".".join(parts[:length]))
        if found:
            return Fact(found, f"L4T {release}")
    return no_fact()


def power_mode(sources: Sources = HERE) -> Fact:
    """Return the name of the power mode; its number says nothing about speed or other boards."""
    status = read_text(sources.root / "var/lib/nvpmodel/status") or ""
    number = re.search(r"pmode:(\d+)", status)
    if number is None:
        return no_fact()
    config = read_text(sources.root / "etc/nvpmodel.conf") or ""
    for match in re.finditer(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", config):
        if int(match[1]) == int(number[1]):
            return Fact(match[2], "/etc/nvpmodel.conf")
    return Fact(f"mode {int(number[1])}", "/var/lib/nvpmodel/status")


def gpu(sources: Sources = HERE) -> Fact:
    """Return the name of the GPU."""
    name = sources.nvml.ask("nvmlDeviceGetName")
    if name:
        return Fact(name.decode() if isinstance(name, bytes) else str(name), "NVML")
    cuda = sources.loaded_cuda()
    if cuda is not None:
        return Fact(str(cuda.get_device_properties(0).name), "torch")
    return Fact("integrated", f"SoC {soc(sources).value}") if is_tegra(sources) else no_fact()


def compute_capability(sources: Sources = HERE) -> Fact:
    """Return CUDA compute capability, such as `8.7`; None without an NVIDIA GPU."""
    found = sources.nvml.ask("nvmlDeviceGetCudaComputeCapability")
    if found:
        return Fact(f"{found[0]}.{found[1]}", "NVML")
    cuda = sources.loaded_cuda()
    if cuda is not None:
        major, minor = cuda.get_device_capability(0)
        return Fact(f"{major}.{minor}", "torch")
    chip = str(soc(sources).value)
    known = TEGRA_CAPABILITY.get(chip)
    return Fact(known, f"SoC {chip}") if known else no_fact()


def unified_memory(sources: Sources = HERE) -> Fact:
    """Tell whether CPU and GPU share one memory; None without a GPU."""
    if is_tegra(sources):
        return Fact(True, f"SoC {soc(sources).value}")
    cuda = sources.loaded_cuda()
    if cuda is not None:
        return Fact(bool(cuda.get_device_properties(0).is_integrated), "torch")
    if gpu(sources).value is None:
        return no_fact()
    # A GPU that has memory of its own can say how much; GB10 answers NotSupported.
    has_own = sources.nvml.ask("nvmlDeviceGetMemoryInfo") is not None
    return Fact(not has_own, "NVML memory info")


def native_bf16(sources: Sources = HERE) -> Fact:
    """Tell whether the hardware itself multiplies bfloat16: the GPU if any, else the CPU."""
    capability = compute_capability(sources).value
    if isinstance(capability, str):
        major, _, minor = capability.partition(".")
        is_native = (int(major), int(minor)) >= BF16_SINCE
        return Fact(is_native, f"compute capability {capability}")
    return cpu_bf16(sources)


def cpu_bf16(sources: Sources = HERE) -> Fact:
    """Tell whether the CPU has instructions for bfloat16; else it converts, and is slower."""
    for field in ("flags", "Features"):
        flags = (_cpuinfo(sources, field) or "").split()
        if flags:
            found = sorted({"bf16", "avx512_bf16", "amx_bf16"} & set(flags))
            return Fact(bool(found), f"/proc/cpuinfo {field}")
    return no_fact()


def _cpuinfo(sources: Sources, field: str) -> str | None:
    text = read_text(sources.root / "proc/cpuinfo") or ""
    match = re.search(rf"^{field}\s*: (.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None


Question = Callable[[Sources], Fact]
FACTS: dict[str, Question] = {
    "board": board,
    "soc": soc,
    "l4t": l4t,
    "jetpack": jetpack,
    "power_mode": power_mode,
    "gpu": gpu,
    "compute_capability": compute_capability,
    "unified_memory": unified_memory,
    "native_bf16": native_bf16,
}
"""Every question of this file, by the name of its answer."""

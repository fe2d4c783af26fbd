"""A Raspberry Pi, a laptop with a graphics card, and containers on a server without one."""

from __future__ import annotations

from types import SimpleNamespace

from tests.boards.nvml import FakeNvml, no_library
from tests.boards.tree import KIB, MIB, NO_SWAP, PROCESS, Board, cpu, meminfo, swaps, zones

# Firmware instead of sensors. The memory controller of control groups is off by default.
_FIRMWARE = """#!/bin/sh
case "$1" in
get_throttled) echo "throttled=0x50002" ;;
pmic_read_adc)
    echo " 3V3_SYS_A current(1)=0.10000000A"
    echo "DDR_VDD2_A current(3)=0.20000000A"
    echo "VDD_CORE_A current(7)=2.00000000A"
    echo " 3V3_SYS_V volt(9)=3.30000000V"
    echo "DDR_VDD2_V volt(11)=1.10000000V"
    echo "VDD_CORE_V volt(15)=0.90000000V"
    echo "  EXT5V_V volt(24)=5.10000000V" ;;
esac
"""
RASPBERRY_PI_5 = Board(
    files={
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
        "proc/cpuinfo": (
            "processor\t: 0\nBogoMIPS\t: 108.00\n"
            "Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp\n"
        ),
        **meminfo(8_250_752, 7_340_032),
        **swaps(("/var/swap", 524_272, 0)),
        **cpu(4, 1500, 2400),
        **zones(cpu__thermal=80_650),
        "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-1.scope\n",
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
        "usr/bin/vcgencmd": _FIRMWARE,
    },
    nvml=no_library(),
    values={
        "board": "Raspberry Pi 5 Model B Rev 1.0",
        "soc": "bcm2712",
        "native_bf16": False,
        "memory_total": 8_250_752 * KIB,
        "memory_available": 7_340_032 * KIB,
        "memory_budget": 7_340_032 * KIB + 100 * MIB - 0.05 * 8_250_752 * KIB,
        "memory_others": (8_250_752 - 7_340_032 - 102_400) * KIB,
        **PROCESS,
        **NO_SWAP,
        "swap": 524_272 * KIB,
        "cpu_load": 75.0,
        "cpu_clock": 1500e6,
        "cpu_clock_max": 2400e6,
        "power": 0.33 + 0.22 + 1.8,
        "rail_3V3_SYS": 0.33,
        "rail_DDR_VDD2": 0.22,
        "rail_VDD_CORE": 1.8,
        "temperature": 80.65,
        "temperature_cpu": 80.65,
        "throttling": "clock capped",
        "throttled_since_boot": "under-voltage, throttled",
    },
    sources={
        "native_bf16": "/proc/cpuinfo Features",
        "power": "sum of 3 rails",
        "rail_VDD_CORE": "vcgencmd pmic_read_adc",
        "throttling": "vcgencmd get_throttled",
    },
)

# A driver that answers everything; the processor's own energy counter is for root only.
_RAPL = "sys/class/powercap/intel-rapl:0"
_THROTTLE = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
RTX_LAPTOP = Board(
    files={
        "sys/class/dmi/id/sys_vendor": "LENOVO\n",
        "sys/class/dmi/id/product_name": "82JU\n",
        "proc/cpuinfo": (
            "processor\t: 0\nmodel name\t: 11th Gen Intel(R) Core(TM) i7-11800H @ 2.30GHz\n"
            "cpu MHz\t\t: 800.000\nflags\t\t: fpu sse2 avx2 avx512f\n"
        ),
        **meminfo(16_252_928, 9_437_184),
        **swaps(("/dev/nvme0n1p3", 8_388_608, 1_048_576)),
        **cpu(2, 3900, 4600),
        **zones(acpitz=55_000, x86_pkg_temp=71_000),
        f"{_RAPL}/name": "package-0\n",
        f"{_RAPL}/energy_uj": None,
        f"{_RAPL}/max_energy_range_uj": "262143328850\n",
        _THROTTLE.format(0, "core"): "7\n",
        _THROTTLE.format(1, "core"): "5\n",
        _THROTTLE.format(0, "package"): "9\n",
        _THROTTLE.format(1, "package"): "9\n",
    },
    nvml=FakeNvml(
        {
            "nvmlDeviceGetName": b"NVIDIA GeForce RTX 3060 Laptop GPU",  # bytes before pynvml 12
            "nvmlDeviceGetCudaComputeCapability": (8, 6),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(
                total=6144 * MIB, free=5120 * MIB, used=1024 * MIB
            ),
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=60),
            "nvmlDeviceGetClockInfo": 1425,
            "nvmlDeviceGetMaxClockInfo": 2100,
            "nvmlDeviceGetTemperature": 78,  # an older driver: no nvmlDeviceGetTemperatureV
            "nvmlDeviceGetPowerUsage": 79_500,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4 | 0x20 | 0x1,
        }
    ),
    values={
        "board": "LENOVO 82JU",
        "soc": "11th Gen Intel(R) Core(TM) i7-11800H @ 2.30GHz",
        "gpu": "NVIDIA GeForce RTX 3060 Laptop GPU",
        "compute_capability": "8.6",
        "unified_memory": False,
        "native_bf16": True,
        "memory_total": 16_252_928 * KIB,
        "memory_available": 9_437_184 * KIB,
        "memory_budget": 9_437_184 * KIB + 100 * MIB - 0.05 * 16_252_928 * KIB,
        "memory_others": (16_252_928 - 9_437_184 - 102_400) * KIB,
        **PROCESS,
        "gpu_memory_total": 6144 * MIB,
        "gpu_memory_available": 5120 * MIB,
        "gpu_memory_used": 1024 * MIB,
        **NO_SWAP,
        "swap": 8192 * MIB,
        "swap_used": 1024 * MIB,
        "cpu_load": 75.0,
        "cpu_clock": 3900e6,
        "cpu_clock_max": 4600e6,
        "gpu_load": 97.0,
        "gpu_clock": 1425e6,
        "gpu_clock_max": 2100e6,
        "power": 79.5,
        "gpu_power": 79.5,
        "temperature": 78.0,
        "temperature_gpu": 78.0,
        "temperature_acpitz": 55.0,
        "temperature_x86_pkg_temp": 71.0,
        "throttling": "GPU power limit, GPU temperature (software)",
        "events_cpu_core": 12,
        "events_cpu_package": 9,
    },
    sources={"power": "NVML, GPU only", "throttling": "NVML, thermal_throttle"},
)

_SERVER = {
    "proc/cpuinfo": (
        "processor\t: 0\nmodel name\t: AMD EPYC 7B13\ncpu MHz\t\t: 2450.000\n"
        "flags\t\t: fpu sse2 avx2\n"
    ),
    "proc/stat": "cpu  1000 0 1000 7000 500 0 500 0 0 0\n",
    **meminfo(65_854_896, 50_000_000),
}
_LIMITED = {
    "soc": "AMD EPYC 7B13",
    "native_bf16": False,
    "memory_total": 4096 * MIB,
    "memory_available": 3000 * MIB,
    "memory_budget": 3000 * MIB + 100 * MIB - 0.05 * 4096 * MIB,
    "memory_others": 996 * MIB,
    **PROCESS,
    "cores": 0.5,
    "cpu_load": 75.0,
    "cpu_clock": 2450e6,
}

CONTAINER_V2 = Board(
    files={
        **_SERVER,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{4096 * MIB}\n",
        "sys/fs/cgroup/memory.high": "max\n",
        "sys/fs/cgroup/memory.current": f"{1200 * MIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 1\nfile 1\ninactive_file {104 * MIB}\n",
        "sys/fs/cgroup/cpu.max": "50000 100000\n",
    },
    nvml=no_library(),
    values=_LIMITED,
    sources={
        "memory_total": "/sys/fs/cgroup/memory.max",
        "memory_available": "/sys/fs/cgroup/memory.max less usage",
        "cores": "quota in /sys/fs/cgroup",
    },
)

# The path in /proc/self/cgroup is the host's and is not mounted here; the top folder is ours.
CONTAINER_V1 = Board(
    files={
        **_SERVER,
        "proc/self/cgroup": "6:memory:/docker/3f1c\n4:cpu,cpuacct:/docker/3f1c\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4096 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1200 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {104 * MIB}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    },
    nvml=no_library(),
    values=_LIMITED,
    sources={
        "memory_total": "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "memory_available": "/sys/fs/cgroup/memory/memory.limit_in_bytes less usage",
        "cores": "quota in /sys/fs/cgroup/cpu",
    },
)

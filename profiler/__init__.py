"""What this device can do, and what a model would need: memory, compute, link, power.

What is named here is the API; everything else may change. Nothing here loads torch.
"""

from typing import TYPE_CHECKING

from profiler.door import lazy_door

if TYPE_CHECKING:
    from profiler.estimate.flops import estimate_flops
    from profiler.estimate.memory import estimate_memory
    from profiler.estimate.sizes import ModelShape, Work
    from profiler.measure import measure_profile
    from profiler.profile import DeviceProfile
    from profiler.sensors.monitor import Monitor
    from profiler.sensors.readings import Reading

__all__ = [
    "DeviceProfile",
    "estimate_flops",
    "estimate_memory",
    "measure_profile",
    "ModelShape",
    "Monitor",
    "Reading",
    "Work",
]

_HOMES = {
    "DeviceProfile": "profile",
    "estimate_flops": "estimate.flops",
    "estimate_memory": "estimate.memory",
    "measure_profile": "measure",
    "ModelShape": "estimate.sizes",
    "Monitor": "sensors.monitor",
    "Reading": "sensors.readings",
    "Work": "estimate.sizes",
}

__getattr__, __dir__ = lazy_door(__name__, _HOMES)

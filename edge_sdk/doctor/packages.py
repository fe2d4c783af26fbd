"""Checks of what is installed: versions, who owns our names, and whether anything can compute.

Imports none of it: a library that kills the process that loads it must not kill the doctor.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from edge_sdk.client.backends import BACKENDS, ONNXRUNTIME, TORCH, Backend
from edge_sdk.doctor.finding import Finding, failure, ok, warning
from edge_sdk.errors import ConfigError
from edge_sdk.transport.keys import make_key_pair
from profiler.sensors.board import gpu, jetpack
from profiler.sensors.sources import HERE, Sources

OURS = ("edge_sdk", "profiler", "coordinator")
# Wheels of torch with CUDA by JetPack; PyPI's would replace them by one without, or for others.
JETPACK_WHEELS = {
    "6": "https://pypi.jetson-ai-lab.io/jp6/cu126",
    "7": "https://pypi.jetson-ai-lab.io/sbsa/cu130",
}
PC_WHEELS = "https://download.pytorch.org/whl/cu126"

Versions = Callable[[str], str | None]


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, None if it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def our_requirements() -> list[str]:
    """Return what our own package says that it needs; empty where it is not installed."""
    try:
        return metadata.requires("edgesplit") or []
    except metadata.PackageNotFoundError:
        return []


def check_packages(
    requirements: Sequence[str] | None = None, versions: Versions = version_of
) -> Finding:
    """Check whether everything that the SDK itself needs is there, and new enough."""
    wanted = our_requirements() if requirements is None else requirements
    ours = versions("edgesplit")
    if ours is None:
        return warning(
            "packages", "edgesplit runs without being installed", "pip install . in its folder"
        )
    bad = unmet([one for one in wanted if "extra ==" not in one], versions)
    if bad:
        needs = " ".join(f"'{one}'" for one in bad)
        found = ", ".join(f"{_name(one)} {versions(_name(one)) or 'is missing'}" for one in bad)
        return failure("packages", found, f"pip install {needs}")
    if versions("pynvml") is not None:
        return warning(
            "packages",
            "the wheel pynvml is deprecated and stands in the way of nvidia-ml-py",
            "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py",
        )
    try:
        make_key_pair()
    except ConfigError:
        return failure("packages", "this pyzmq has no CURVE", "pip install --force-reinstall pyzmq")
    names = {_name(one) for one in wanted if "extra ==" not in one}
    return ok("packages", f"edgesplit {ours} and the {len(names)} packages that it needs")


def unmet(requirements: Sequence[str], versions: Versions = version_of) -> list[str]:
    """Return those of *requirements*, such as `numpy>=1.24`, that nothing installed meets."""
    return [one for one in (_plain(each) for each in requirements) if not _is_met(one, versions)]


def _plain(requirement: str) -> str:
    return requirement.split(";")[0].strip()


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]


def _is_met(requirement: str, versions: Versions) -> bool:
    found = versions(_name(requirement))
    least = re.search(r">=\s*([\d.]+)", requirement)
    return found is not None and (least is None or release(found) >= release(least[1]))


def release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, (2, 4) of `2.4.0a0+nv24.7`, without zeros at their end."""
    digits = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in digits[0].split(".")] if digits else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def origins() -> dict[str, Path | None]:
    """Return the folder of each of our packages as Python would find it, without importing it."""
    specs = {name: importlib.util.find_spec(name) for name in OURS}
    return {
        name: Path(spec.origin).parent if spec is not None and spec.origin else None
        for name, spec in specs.items()
    }


def check_origins(
    found: Mapping[str, Path | None] | None = None,
    owners: Callable[[], Mapping[str, Sequence[str]]] = metadata.packages_distributions,
) -> Finding:
    """Check whether our three packages are ours: other wheels of the same names exist."""
    folders = origins() if found is None else found
    home = folders["edge_sdk"]
    base = None if home is None else home.parent
    for name in OURS:
        folder = folders[name]
        if folder is None or folder.parent != base:
            where = "is missing" if folder is None else f"comes from {folder.parent}, not {base}"
            other = [one for one in owners().get(name, ()) if one != "edgesplit"]
            whose = f" (wheel {', '.join(other)})" if other else ""
            again = "pip install --force-reinstall --no-deps edgesplit"
            cure = f"pip uninstall -y {' '.join(other)} && {again}" if other else again
            if folder is not None and not other:
                cure = f"start from a folder without {name}, or rename {folder}"
            return failure("imports", f"{name} {where}{whose}", cure)
    return ok("imports", f"{', '.join(OURS)} from {base}")


def torch_cure(sources: Sources = HERE) -> str:
    """Return how to get a torch that can use the GPU of this machine, or any torch at all."""
    release = str(jetpack(sources).value or "")
    major = release.split(".")[0]
    if major in JETPACK_WHEELS:
        return f"pip install --force-reinstall torch --index-url {JETPACK_WHEELS[major]}"
    if major:
        return (
            f"no torch for JetPack {release} has Python 3.10: device=cpu with PyPI's torch, or a "
            "container that brings its own CUDA"
        )
    if gpu(sources).value is not None:
        return f"pip install --force-reinstall torch --index-url {PC_WHEELS}"
    return TORCH.install


def installed_backends(versions: Versions = version_of) -> list[str]:
    """Return the names of the backends whose library is installed."""
    return [name for name, backend in BACKENDS.items() if _wheels(backend, versions)]


def _wheels(backend: Backend, versions: Versions) -> list[str]:
    return [wheel for wheel in backend.wheels if versions(wheel) is not None]


def check_backend(
    sources: Sources = HERE,
    requirements: Sequence[str] | None = None,
    versions: Versions = version_of,
) -> Finding:
    """Check whether torch with its companions, or onnxruntime, is installed."""
    wanted = our_requirements() if requirements is None else requirements
    several = _wheels(ONNXRUNTIME, versions)
    if len(several) > 1:
        text = f"{' and '.join(several)} overwrite each other's files"
        cure = f"pip uninstall -y {' '.join(several)} && pip install {several[0]}"
        return failure("backend", text, cure)
    found = installed_backends(versions)
    if not found:
        return failure(
            "backend",
            "neither torch nor onnxruntime is installed: nothing here can compute a block",
            f"{torch_cure(sources)}; or, small and on the CPU: {ONNXRUNTIME.install}",
        )
    if TORCH.name not in found and versions("tokenizers") is None:
        text = f"{several[0]} is there, but not tokenizers"
        return failure("backend", text, ONNXRUNTIME.install)
    companions = unmet([one for one in wanted if "extra == 'torch'" in one], versions)
    if found == [TORCH.name] and companions:
        needs = " ".join(f"'{one}'" for one in companions)
        text = f"torch {versions('torch')} is there, but not {', '.join(companions)}"
        return failure("backend", text, f"pip install {needs}")
    # Backends may share a wheel.
    wheels = dict.fromkeys(w for name in found for w in _wheels(BACKENDS[name], versions))
    return ok("backend", ", ".join(f"{wheel} {versions(wheel)}" for wheel in wheels))

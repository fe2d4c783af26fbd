"""Checks of what computes: torch and onnxruntime run real kernels in a process of their own.

That process may be killed, hang or raise; this file says what each of these means and what mends
it. What the process runs is `kernels.py`.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from edge_sdk.client.backends import ONNXRUNTIME
from edge_sdk.doctor.finding import Finding, failure, ok, warning
from edge_sdk.doctor.packages import Versions, release, torch_cure, version_of
from profiler.sensors.board import cpu_bf16, gpu, is_tegra, jetpack, native_bf16
from profiler.sensors.sources import HERE, Sources

TRIAL = "edge_sdk.doctor.kernels"
# A Raspberry Pi 4 with an SD card needs a quarter of a minute to load torch; this one hangs.
TRIAL_TIMEOUT_S = 60.0
# After a kill, a process that waits for a driver may not end at all.
KILL_WAIT_S = 2.0
# Largest relative error of a gradient: what the dtype loses by itself, and a margin.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
OURS_TOLERANCE = {"int8": 0.03, "int4": 0.2}
# Others that may be installed; runs do not use them.
THEIRS_TOLERANCE = {"bitsandbytes": 0.2, "torchao": 0.05}
# The last version of torch that is known to run on ARMv8.0 before the broken one, and the first
# after it that does.
SIGILL_BEFORE, SIGILL_SINCE = "torch==2.9.*", (2, 11)


class Attempt(NamedTuple):
    """The end of a process."""

    code: int | None
    """Negative: killed by that signal. None: it did not end in time."""
    out: str
    err: str


class CommandRunner(Protocol):
    """Runs Python with arguments, for at most so many seconds."""

    def __call__(self, arguments: Sequence[str], timeout_s: float) -> Attempt:
        """Return how it ended; never raises because of what it did."""


def run_python(arguments: Sequence[str], timeout_s: float) -> Attempt:
    """Run this Python in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            out, err = process.communicate(timeout=KILL_WAIT_S)
        except subprocess.TimeoutExpired:
            out, err = "", ""
        return Attempt(None, out, err)
    return Attempt(process.returncode, out, err)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one stage."""

    found: Mapping[str, Any] | None = None
    """What it returned; None where it did not."""
    trouble: str = ""
    """What it raised, or how its process ended."""

    @property
    def error(self) -> float:
        """Relative error of what was computed; infinite where nothing was."""
        value = (self.found or {}).get("error")
        return float(value) if value is not None else float("inf")


# Without these the others say nothing new.
NEEDED = ("torch", "float32")
NOT_TRIED = Outcome(trouble="not tried")


def try_stages(
    device: str,
    stages: Sequence[str],
    run: CommandRunner = run_python,
    timeout_s: float = TRIAL_TIMEOUT_S,
) -> dict[str, Outcome]:
    """Run *stages* in order; the one that kills its process costs only itself.

    Whatever hangs is waited for once: nothing is tried after it, nor after what the rest needs.
    """
    outcomes = dict.fromkeys(stages, NOT_TRIED)
    left = list(stages)
    while left:
        attempt = run(["-m", TRIAL, device, *left], timeout_s)
        ended = _ended(attempt.out)
        outcomes.update({stage: ended[stage] for stage in left if stage in ended})
        left = [stage for stage in left if stage not in ended]
        if not left:
            break
        culprit = left.pop(0)
        outcomes[culprit] = Outcome(trouble=_end(attempt, timeout_s))
        if attempt.code is None or culprit in NEEDED:
            break
    return outcomes


def _ended(out: str) -> dict[str, Outcome]:
    """Return what the lines of a trial say about the stages that came to an end."""
    found = {}
    for line in out.splitlines():
        try:
            said = json.loads(line)
            stage = said.get("end")
        except (ValueError, AttributeError):
            continue  # a library that prints
        if stage is not None:
            found[stage] = Outcome(said.get("found"), said.get("error", ""))
    return found


def _end(attempt: Attempt, timeout_s: float) -> str:
    """Say how a process ended that was expected to say so itself."""
    if attempt.code is None:
        return f"hangs: no end after {timeout_s:.0f} s"
    number = -attempt.code if attempt.code < 0 else attempt.code - 128  # a shell adds 128
    if number in {one.value for one in signal.Signals}:
        return f"killed by {signal.Signals(number).name}"
    last = (attempt.err.strip().splitlines() or ["no message"])[-1]
    return f"ended with code {attempt.code}: {last[:300]}"


# ---- what it means -------------------------------------------------------------------------------


def explain(
    trouble: str, sources: Sources = HERE, versions: Versions = version_of
) -> tuple[str, str]:
    """Return what *trouble* means, as an addition to it, and what mends it."""
    again = torch_cure(sources)
    if "SIGILL" in trouble:
        is_new = release(versions("torch") or "") >= SIGILL_SINCE
        cure = SIGILL_BEFORE if is_new else f"torch>={'.'.join(map(str, SIGILL_SINCE))}"
        return "it was built for a newer processor than this one", f"pip install '{cure}'"
    if "SIGKILL" in trouble:
        return "memory ran out, most likely", "sudo dmesg | tail; then stop what else runs"
    if re.search(r"SIG(SEGV|BUS|ABRT|FPE)", trouble):
        return "its libraries do not fit each other or this machine", again
    if "hangs" in trouble:
        return "the driver or the GPU does not answer", "sudo dmesg | tail -50; then reboot"
    if "no kernel image" in trouble or "named symbol not found" in trouble:
        return "it was built for other GPUs than this one", again
    # On a Jetson an allocation that fails asks NVML for words, and dies of that.
    if re.search(r"out of memory|NVML_SUCCESS == r|NvMapMemAlloc|can't allocate", trouble):
        if is_tegra(sources):
            return "the GPU's memory is used up", "sync; sudo sysctl -w vm.drop_caches=3"
        return "memory is used up", "nvidia-smi; then stop what else runs"
    if re.search(r"driver.*(too old|insufficient)", trouble):
        return "its CUDA is newer than the driver", f"update the driver, or {again}"
    if "cannot open shared object" in trouble:
        return "a library that it needs is missing", again
    return "", f"python -m {TRIAL} auto torch float32"


def _told(
    check: str, name: str, trouble: str, sources: Sources, versions: Versions
) -> tuple[str, str, str]:
    meaning, cure = explain(trouble, sources, versions)
    text = f"{name}: {trouble}" + (f"; {meaning}" if meaning else "")
    return check, text, cure


def check_torch(
    outcome: Outcome,
    device: str = "auto",
    sources: Sources = HERE,
    versions: Versions = version_of,
) -> Finding:
    """Check whether torch loads, and whether it was built for this machine."""
    name = f"torch {versions('torch')}"
    if outcome.found is None:
        return failure(*_told("torch", name, outcome.trouble, sources, versions))
    found, here = outcome.found, gpu(sources).value
    if found["is_available"]:
        return ok("torch", f"{name}, CUDA {found['cuda']}, {found['gpu']} ({found['capability']})")
    if here is None and device.startswith("cuda"):
        text = f"{name}: the config says device: {device}, but no NVIDIA GPU is to be seen here"
        return failure("torch", text, "device=cpu; in a container: --runtime nvidia")
    if found["cuda"] is None:
        text, cure = f"{name} is a build without CUDA", torch_cure(sources)
    else:
        why = "; ".join(found["notes"]) or "no driver, or a container without the GPU"
        text = f"{name} is built for CUDA {found['cuda']} but sees no GPU: {why}"
        cure = "docker run --runtime nvidia ...; on the host: nvidia-smi, CUDA_VISIBLE_DEVICES"
        if is_tegra(sources):
            cure = "sudo usermod -aG video,render $USER; in a container: --runtime nvidia"
    if device.startswith("cuda"):
        return failure("torch", f"{text}, and the config says device: {device}", cure)
    major = str(jetpack(sources).value or "").split(".")[0]
    if here is None or major in ("4", "5"):
        return ok("torch", f"{text}; the CPU computes")
    return warning("torch", f"{text}: the GPU ({here}) is not used", cure)


def check_kernel(
    outcome: Outcome, place: str, sources: Sources = HERE, versions: Versions = version_of
) -> Finding:
    """Check whether a weight with an adapter runs forward and backward, and correctly."""
    name = f"LoRA forward and backward on {place}"
    if outcome.found is None:
        return failure(*_told("kernel", name, outcome.trouble, sources, versions))
    text = f"{name}, relative error {outcome.error:.0e}"
    if not outcome.error <= TOLERANCE["float32"]:
        return failure("kernel", f"{text}, which is wrong", torch_cure(sources))
    return ok("kernel", f"{text}, {1000 * float(outcome.found['seconds']):.1f} ms")


def check_dtype(
    dtype: str, outcome: Outcome, place: str, compute: str = "auto", sources: Sources = HERE
) -> Finding:
    """Check whether products in *dtype* work, and whether the hardware itself makes them.

    Args:
        dtype: `bfloat16` or `float16`.
        outcome: What came of it.
        place: `cpu` or `cuda`.
        compute: The dtype that the config asks for; failing is worse for that one.
        sources: What tells what the hardware has.
    """
    bad = failure if compute == dtype else warning
    cure = "compute=float32"
    if outcome.found is None:
        meaning, _ = explain(outcome.trouble, sources)
        text = f"does not work on {place}: {outcome.trouble}"
        return bad(dtype, f"{text}; {meaning}" if meaning else text, cure)
    if not outcome.error <= TOLERANCE[dtype]:
        return bad(dtype, f"computes wrong: relative error {outcome.error:.0e}", cure)
    text = f"works on {place}, relative error {outcome.error:.0e}"
    if dtype != "bfloat16":
        return ok(dtype, text)
    native = (cpu_bf16 if place == "cpu" else native_bf16)(sources)
    if native.value is False:
        text = f"{text}, but emulated and slow ({native.source})"
        if compute == dtype:
            return warning(dtype, text, "compute=auto")
        return ok(dtype, f"{text}; compute: auto does not take it")
    return ok(dtype, f"{text}, {'native' if native.value else 'native or not is unknown'}")


def check_quantised(
    outcomes: Mapping[str, Outcome],
    base: str = "float32",
    sources: Sources = HERE,
    versions: Versions = version_of,
) -> Finding:
    """Check whether frozen weights in 8 and 4 bits work: our form, and installed libraries.

    Args:
        outcomes: By stage; libraries that are not installed are absent.
        base: How the config wants frozen weights; failing is worse for that form.
        sources: Where to look for the machine.
        versions: What is installed.
    """
    good, bad = [], {}
    for name, most in (OURS_TOLERANCE | THEIRS_TOLERANCE).items():
        if name not in outcomes:
            continue
        outcome = outcomes[name]
        if outcome.error <= most:
            good.append(f"{name} (error {100 * outcome.error:.1f} %)")
            continue
        meaning, _ = explain(outcome.trouble, sources, versions)
        trouble = outcome.trouble or f"relative error {outcome.error:.0e}"
        bad[name] = f"{name} fails: {trouble}" + (f"; {meaning}" if meaning else "")
    working = f"{', '.join(good)} work" if good else "none works"
    if not bad:
        return ok("quantised", f"frozen weights: {working}")
    text = f"{'; '.join(bad.values())}; {working}"
    if base in bad:
        return failure("quantised", text, "base=float32")
    theirs = [name for name in bad if name in THEIRS_TOLERANCE]
    cure = f"runs do not use it: pip uninstall -y {' '.join(theirs)}" if theirs else "base=float32"
    return warning("quantised", text, cure)


def check_onnxruntime(
    outcome: Outcome,
    *,
    is_needed: bool,
    sources: Sources = HERE,
    versions: Versions = version_of,
) -> Finding:
    """Check whether onnxruntime loads and multiplies; where torch computes, none is needed."""
    bad = failure if is_needed else warning
    wheel = next((one for one in ONNXRUNTIME.wheels if versions(one)), ONNXRUNTIME.name)
    cure = f"pip install --force-reinstall {wheel}"
    if outcome.found is None:
        meaning, _ = explain(outcome.trouble, sources, versions)
        text = outcome.trouble + (f"; {meaning}" if meaning else "")
        return bad("onnxruntime", text, cure)
    if not outcome.error <= TOLERANCE["float32"]:
        text = f"computes wrong: relative error {outcome.error:.0e}"
        return bad("onnxruntime", text, cure)
    version = outcome.found["version"]
    return ok("onnxruntime", f"{version}: a product, relative error {outcome.error:.0e}")

"""What a kernel that kills, hangs or errs means; the processes that do so are real."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.doctor import compute
from edge_sdk.doctor import kernels as kernels
from edge_sdk.doctor.compute import Attempt, CommandRunner, Outcome
from profiler.sensors.sources import Nvml, Sources
from tests.boards import build
from tests.boards.nvml import no_library

STAGES = ("torch", "float32", "bfloat16", "float16")
STAND_IN = """
import json, os, signal, sys, time
bad, act, found = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
device, *stages = sys.argv[6:]
for stage in stages:
    print(json.dumps({"begin": stage}), flush=True)
    print("a library talks", flush=True)
    if stage == bad:
        exec(act)
    print(json.dumps({"end": stage, "found": found.get(stage, {})}), flush=True)
"""


def dying(stage: str, act: str, found: dict[str, Any] | None = None) -> CommandRunner:
    """Return a runner whose process comes to grief in *stage*."""

    def run(arguments: Sequence[str], timeout_s: float) -> Attempt:
        code = ["-c", STAND_IN, stage, act, json.dumps(found or {})]
        return compute.run_python([*code, *arguments], timeout_s)

    return run


def installed(**versions: str) -> compute.Versions:
    """Return what says which distributions are installed."""
    return lambda name: versions.get(name.replace("-", "_"))


@pytest.fixture
def bare(tmp_path: Path) -> Sources:
    """A machine of which nothing is known."""
    return Sources(tmp_path, Nvml(no_library()))


@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_signal_costs_only_the_stage_that_it_ends(name: str) -> None:
    """The stage is told with its signal; those before and after it have their results."""
    act = f"os.kill(os.getpid(), signal.{name})"

    found = compute.try_stages("cpu", STAGES, dying("bfloat16", act), 20.0)

    assert found["bfloat16"] == Outcome(trouble=f"killed by {name}")
    assert [found[stage].found for stage in ("torch", "float32", "float16")] == [{}, {}, {}]


def test_nothing_is_tried_without_what_it_needs() -> None:
    """A torch that cannot be loaded is started once; the rest was not tried."""
    calls = []
    inner = dying("torch", "os.kill(os.getpid(), signal.SIGILL)")

    def counted(arguments: Sequence[str], timeout_s: float) -> Attempt:
        calls.append(arguments)
        return inner(arguments, timeout_s)

    found = compute.try_stages("cpu", STAGES, counted, 20.0)

    assert found["torch"].trouble == "killed by SIGILL"
    assert {found[stage].trouble for stage in STAGES[1:]} == {"not tried"}
    assert len(calls) == 1


def test_what_hangs_is_ended_and_waited_for_once() -> None:
    """A kernel that never comes back is killed after the limit; nothing follows it."""
    found = compute.try_stages("cuda", STAGES, dying("bfloat16", "time.sleep(60)"), 0.7)

    assert found["float32"].found == {}
    assert found["bfloat16"].trouble == "hangs: no end after 1 s"
    assert found["float16"].trouble == "not tried"


def test_a_process_that_leaves_early_is_quoted() -> None:
    """Its exit code and the last line that it wrote."""
    act = "sys.exit('libcudnn.so.9: cannot open shared object file')"

    found = compute.try_stages("cuda", STAGES, dying("torch", act), 20.0)

    text = "ended with code 1: libcudnn.so.9: cannot open shared object file"
    assert found["torch"].trouble == text


@pytest.mark.parametrize(
    ("board", "trouble", "meaning", "cure"),
    [
        ("raspberry_pi_5", "killed by SIGILL", "newer processor", "pip install 'torch>=2.11'"),
        ("orin_nano_jp6", "killed by SIGSEGV", "do not fit", "jetson-ai-lab.io/jp6/cu126"),
        ("orin_nano_jp6", "killed by SIGKILL", "memory ran out", "dmesg"),
        ("thor_jp7", "RuntimeError: CUDA error: no kernel image is", "other GPUs", "sbsa/cu130"),
        ("orin_nano_jp6", "Error named symbol not found at line 74", "other GPUs", "jp6/cu126"),
        ("xavier_nx_jp5", "no kernel image", "other GPUs", "no torch for JetPack 5.1.6"),
        ("orin_nano_jp6", "NVML_SUCCESS == r INTERNAL ASSERT", "memory is", "vm.drop_caches=3"),
        ("rtx_laptop", "OutOfMemoryError: CUDA out of memory.", "memory is", "nvidia-smi"),
        ("rtx_laptop", "The NVIDIA driver on your system is too old", "newer", "update the driver"),
        ("rtx_laptop", "hangs: no end after 60 s", "does not answer", "reboot"),
        ("rtx_laptop", "OSError: libcupti.so: cannot open shared object", "missing", "whl/cu126"),
        ("rtx_laptop", "RuntimeError: something new", "", "python -m edge_sdk.doctor.kernels"),
    ],
)
def test_what_is_known_to_go_wrong_is_explained(
    board: str, trouble: str, meaning: str, cure: str, tmp_path: Path
) -> None:
    """Each trouble of real boards has a meaning and a command, by the board's own JetPack."""
    sources = build(board, tmp_path).sources

    found = compute.explain(trouble, sources, installed(torch="2.10.0"))

    assert meaning in found[0]
    assert cure in found[1]


def test_a_new_torch_that_is_illegal_is_replaced_by_an_old_one(bare: Sources) -> None:
    """Where the version with the known repair fails as well, an earlier one is named."""
    _, cure = compute.explain("killed by SIGILL", bare, installed(torch="2.13.0+cpu"))

    assert cure == "pip install 'torch==2.9.*'"


CPU_BUILD = {"version": "2.13.0", "cuda": None, "is_available": False, "notes": [], "device": "cpu"}
BLIND = {**CPU_BUILD, "cuda": "12.6", "notes": ["NVML cannot be started"]}
SEEING = {**BLIND, "is_available": True, "gpu": "Orin", "capability": "8.7", "device": "cuda"}


@pytest.mark.parametrize(
    ("board", "found", "device", "status", "text", "cure"),
    [
        ("raspberry_pi_5", CPU_BUILD, "auto", "ok", "the CPU computes", ""),
        ("orin_nano_jp6", CPU_BUILD, "auto", "warning", "is not used", "jp6/cu126"),
        ("thor_jp7", CPU_BUILD, "auto", "warning", "(NVIDIA Thor)", "sbsa/cu130"),
        ("rtx_laptop", CPU_BUILD, "auto", "warning", "build without CUDA", "whl/cu126"),
        ("nano_jp4", CPU_BUILD, "auto", "ok", "the CPU computes", ""),
        ("raspberry_pi_5", CPU_BUILD, "cuda", "failure", "no NVIDIA GPU", "device=cpu"),
        ("orin_nano_jp6", CPU_BUILD, "cuda", "failure", "device: cuda", "jp6/cu126"),
        ("orin_nano_jp6", BLIND, "auto", "warning", "NVML cannot be", "usermod -aG video"),
        ("rtx_laptop", BLIND, "cuda", "failure", "sees no GPU", "--runtime nvidia"),
        ("orin_nano_jp6", SEEING, "auto", "ok", "CUDA 12.6, Orin (8.7)", ""),
    ],
)
def test_the_build_of_torch_is_held_against_the_board(
    board: str,
    found: dict[str, Any],
    device: str,
    status: str,
    text: str,
    cure: str,
    tmp_path: Path,
) -> None:
    """A build without CUDA is fine on a Pi, a pity on a GPU board, and fatal where CUDA is set."""
    sources = build(board, tmp_path).sources

    finding = compute.check_torch(Outcome(found), device, sources, installed(torch="2.13.0"))

    assert finding.status == status
    assert text in finding.text
    assert cure in finding.cure
    assert bool(finding.cure) == (status != "ok")


def test_a_torch_that_kills_is_a_failure_with_its_cure(bare: Sources) -> None:
    """The line says what happened, what it means and what to install."""
    outcome = compute.try_stages(
        "cpu", STAGES, dying("torch", "os.kill(os.getpid(), signal.SIGILL)"), 20.0
    )["torch"]

    finding = compute.check_torch(outcome, "auto", bare, installed(torch="2.10.0"))

    assert (finding.status, finding.cure) == ("failure", "pip install 'torch>=2.11'")
    assert finding.text == (
        "torch 2.10.0: killed by SIGILL; it was built for a newer processor than this one"
    )


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome({"error": 1e-6, "seconds": 0.001}), "ok"),
        (Outcome({"error": 0.5, "seconds": 0.001}), "failure"),
        (Outcome({"error": float("nan"), "seconds": 0.001}), "failure"),
        (Outcome(trouble="RuntimeError: CUDA error: no kernel image"), "failure"),
    ],
)
def test_a_kernel_must_run_and_be_right(outcome: Outcome, status: str, bare: Sources) -> None:
    """A wrong gradient is a failure as much as none."""
    assert compute.check_kernel(outcome, "cuda", bare).status == status


@pytest.mark.parametrize(
    ("board", "place", "compute_in", "status", "text"),
    [
        ("orin_nano_jp6", "cuda", "auto", "ok", "native"),
        ("xavier_nx_jp5", "cuda", "auto", "ok", "compute: auto does not take it"),
        ("xavier_nx_jp5", "cuda", "bfloat16", "warning", "emulated and slow"),
        ("raspberry_pi_5", "cpu", "bfloat16", "warning", "emulated and slow"),
    ],
)
def test_emulated_bfloat16_is_told_from_native(
    board: str, place: str, compute_in: str, status: str, text: str, tmp_path: Path
) -> None:
    """That torch can do it says nothing; the hardware decides, and the config how bad it is."""
    sources = build(board, tmp_path).sources

    finding = compute.check_dtype("bfloat16", Outcome({"error": 1e-3}), place, compute_in, sources)

    assert finding.status == status
    assert text in finding.text


def test_a_dtype_that_fails_matters_where_it_is_wanted(bare: Sources) -> None:
    """A warning, or a failure where the config asks for that dtype."""
    outcome = Outcome(trouble="RuntimeError: not implemented for 'Half'")

    by_chance = compute.check_dtype("float16", outcome, "cpu", "auto", bare)
    wanted = compute.check_dtype("float16", outcome, "cpu", "float16", bare)
    wrong = compute.check_dtype("float16", Outcome({"error": 0.3}), "cpu", "auto", bare)

    assert (by_chance.status, wanted.status, wrong.status) == ("warning", "failure", "warning")
    assert wanted.cure == "compute=float32"


def test_quantised_weights_are_ours_and_those_of_others(bare: Sources) -> None:
    """A failing form of ours is fatal where it is wanted; a failing library never is."""
    fine, broken = Outcome({"error": 0.01}), Outcome(trouble="Error named symbol not found")
    ours = {"int8": fine, "int4": fine}

    assert compute.check_quantised(ours, "int8", bare).status == "ok"
    assert compute.check_quantised({**ours, "int4": broken}, "int4", bare).status == "failure"
    theirs = compute.check_quantised({**ours, "bitsandbytes": broken}, "int8", bare)
    assert theirs.status == "warning"
    assert "it was built for other GPUs" in theirs.text
    assert theirs.cure == "runs do not use it: pip uninstall -y bitsandbytes"


def test_onnxruntime_matters_most_where_it_is_used(bare: Sources) -> None:
    """Where it computes a broken onnxruntime is a failure, where torch does a warning."""
    broken, fine = Outcome(trouble="killed by SIGILL"), Outcome({"error": 1e-7, "version": "1.31"})

    assert compute.check_onnxruntime(broken, is_needed=True, sources=bare).status == "failure"
    assert compute.check_onnxruntime(broken, is_needed=False, sources=bare).status == "warning"
    assert compute.check_onnxruntime(fine, is_needed=True, sources=bare).status == "ok"


@pytest.mark.parametrize("wheel", ["onnxruntime", "onnxruntime-training-cpu"])
def test_what_is_installed_again_is_what_was_there(bare: Sources, wheel: str) -> None:
    """The wheels exclude each other: another one would change what the device computes with."""
    versions = installed(**{wheel.replace("-", "_"): "1.19.2"})
    broken = Outcome(trouble="killed by SIGILL")

    found = compute.check_onnxruntime(broken, is_needed=True, sources=bare, versions=versions)

    assert found.cure == f"pip install --force-reinstall {wheel}"


@pytest.mark.parametrize(("stage", "most"), (compute.TOLERANCE | compute.OURS_TOLERANCE).items())
def test_real_kernels_stay_within_their_tolerance(stage: str, most: float) -> None:
    """What each stage computes here is as near to the exact result as its type allows."""
    pytest.importorskip("torch")

    assert kernels.STAGES[stage]("cpu")["error"] <= most


def test_the_real_onnxruntime_multiplies() -> None:
    """The graph that the trial carries is loaded and run through the backend's own door."""
    pytest.importorskip("onnxruntime")

    found = compute.try_stages("cpu", ["onnxruntime"])["onnxruntime"]

    assert found.error < 1e-6, found


def test_the_gradients_of_the_trial_are_those_of_torch() -> None:
    """What the kernels are held against, worked out by hand, is what autograd finds in float64."""
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(1)
    x, w, a, b = (draw.normal(size=size) for size in ((5, 7), (6, 7), (2, 7), (6, 2)))
    ta, tb = (torch.tensor(one, requires_grad=True) for one in (a, b))

    y = torch.tensor(x) @ torch.tensor(w).T + kernels.SCALE * (torch.tensor(x) @ ta.T) @ tb.T
    torch.autograd.backward(0.5 * y.pow(2).mean())

    found = kernels._gradients(x, w, a, b)
    np.testing.assert_allclose(found[0], ta.grad.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found[1], tb.grad.numpy(), rtol=1e-12)

"""What is installed: versions, names that others own, and something that computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.doctor import packages
from profiler.sensors.sources import Nvml, Sources
from tests.boards import build
from tests.boards.nvml import no_library

NEEDS = ["numpy>=1.24", "msgpack>=1.2.1", "torch>=2.4; extra == 'torch'", "peft; extra == 'torch'"]
FINE = {"edgesplit": "0.1.0", "numpy": "2.0", "msgpack": "1.2.1"}


def installed(versions: dict[str, str]) -> packages.Versions:
    """Return what says which distributions are installed."""
    return versions.get


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.4.0a0+nv24.7", (2, 4)), ("2.13.0+cpu", (2, 13)), ("1.2.1", (1, 2, 1)), ("x", ())],
)
def test_numbers_of_a_version(version: str, numbers: tuple[int, ...]) -> None:
    """Wheels of boards carry more than numbers in their versions."""
    assert packages.release(version) == numbers


@pytest.mark.parametrize(
    ("change", "status", "cure"),
    [
        ({}, "ok", ""),
        ({"msgpack": "1.1.0"}, "failure", "pip install 'msgpack>=1.2.1'"),
        ({"numpy": None}, "failure", "pip install 'numpy>=1.24'"),
        ({"pynvml": "13.0.1"}, "warning", "pip uninstall -y pynvml"),
        ({"edgesplit": None}, "warning", "pip install ."),
    ],
)
def test_packages_are_there_and_new_enough(
    change: dict[str, str | None], status: str, cure: str
) -> None:
    """What is missing or too old is named with the command; what only extras need is not asked."""
    versions = {name: value for name, value in {**FINE, **change}.items() if value is not None}

    finding = packages.check_packages(NEEDS, installed(versions))

    assert finding.status == status
    assert cure in finding.cure


def test_a_wheel_of_the_same_name_is_found_out(tmp_path: Path) -> None:
    """A foreign `profiler` is named with its wheel; a folder in the way without one, too."""
    ours = {name: tmp_path / "site" / name for name in packages.OURS}
    theirs = {**ours, "profiler": tmp_path / "other" / "profiler"}

    fine = packages.check_origins(ours, dict)
    wheel = packages.check_origins(theirs, lambda: {"profiler": ["some-profiler", "edgesplit"]})
    folder = packages.check_origins(theirs, dict)
    missing = packages.check_origins({**ours, "coordinator": None}, dict)

    assert fine.status == "ok"
    assert "(wheel some-profiler)" in wheel.text
    assert wheel.cure.startswith("pip uninstall -y some-profiler && ")
    assert str(theirs["profiler"]) in folder.cure
    assert {wheel.status, folder.status, missing.status} == {"failure"}


def test_this_environment_is_in_order() -> None:
    """Our own packages come from one place, and their needs are met."""
    assert packages.check_origins().status == "ok"
    assert packages.check_packages().status == "ok"


@pytest.mark.parametrize(
    ("versions", "status", "text"),
    [
        ({"torch": "2.9", "peft": "0.18"}, "ok", "torch 2.9"),
        ({"onnxruntime": "1.31", "tokenizers": "0.22"}, "ok", "onnxruntime 1.31"),
        ({"onnxruntime": "1.31"}, "failure", "but not tokenizers"),
        (
            {"onnxruntime-training-cpu": "1.19.2", "tokenizers": "0.22"},
            "ok",
            "onnxruntime-training-cpu 1.19.2",
        ),
        ({"onnxruntime-training-cpu": "1.19.2"}, "failure", "but not tokenizers"),
        ({"torch": "2.9"}, "failure", "but not peft"),
        ({"torch": "2.1", "peft": "0.18"}, "failure", "but not torch>=2.4"),
        ({}, "failure", "neither torch nor onnxruntime"),
        ({"onnxruntime": "1.31", "onnxruntime-training": "1.19"}, "failure", "overwrite"),
    ],
)
def test_something_must_compute(
    versions: dict[str, str], status: str, text: str, tmp_path: Path
) -> None:
    """One of both is enough; torch needs its companions; two onnxruntimes spoil each other."""
    nowhere = Sources(tmp_path, Nvml(no_library()))

    finding = packages.check_backend(nowhere, NEEDS, installed(versions))

    assert finding.status == status
    assert text in finding.text
    assert finding.text.count("onnxruntime-training-cpu") <= 1


@pytest.mark.parametrize(
    ("board", "cure"),
    [
        ("orin_nano_jp6", "https://pypi.jetson-ai-lab.io/jp6/cu126"),
        ("thor_jp7", "https://pypi.jetson-ai-lab.io/sbsa/cu130"),
        ("agx_orin_jp5", "no torch for JetPack 5"),
        ("nano_jp4", "no torch for JetPack 4"),
        ("rtx_laptop", "https://download.pytorch.org/whl/cu126"),
        ("raspberry_pi_5", "pip install 'edgesplit[torch]'"),
    ],
)
def test_every_board_has_its_own_torch(board: str, cure: str, tmp_path: Path) -> None:
    """PyPI's wheel is right for a Pi and wrong for a Jetson."""
    finding = packages.check_backend(build(board, tmp_path).sources, NEEDS, installed({}))

    assert cure in finding.cure
    assert "'edgesplit[onnx]'" in finding.cure

"""On a device of its own a step mixes no devices, and waits for the device only where it has to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch.utils.backend_registration as backends

from tests.conftest import TESTS

# Same numbers by other kernels of attention, behind AdamW, which divides by small ones.
BOUND = 1e-3
# What a step has to know before it can go on, and how often: whether every loss is finite, and the
# loss itself; whether every gradient is; what importance was measured; where the targets are.
NUMBERS = {
    "nonzero edge_sdk/model/loss.py _targets": 1,
    "copy edge_sdk/runtime/torch_runtime.py each_total": 1,
    "number edge_sdk/runtime/training.py step": 1,
    "copy edge_sdk/lora/importance.py close_step": 1,
}
DOWN = "copy edge_sdk/runtime/transfers.py download"
MODELS_OWN = "edge_sdk/model/"
DEVICES = (
    "device llama",
    "device llama alone",
    "device llama again",
    "device llama int8",
    "device llama int4",
    "device mixtral",
    "device bert",
)
ENGINES = ("engine llama", "engine llama int4", "engine gpt2", "engine mixtral", "engine bert")


@cache
def told() -> Any:
    """What all cases have led to, run in a process of their own."""
    if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch knows no device that is written in Python")
    command = [sys.executable, "-m", "tests.far_steps"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def waits(case: str) -> Counter[str]:
    """What threads have waited for in a step, without what a model's own code asks for."""
    found = Counter(told()[case]["waits"])
    own = [why for why in found if MODELS_OWN in why and why not in NUMBERS]
    for why in own:
        del found[why]
    return found


@pytest.mark.parametrize("case", ["absent parts", *DEVICES, *ENGINES])
def test_a_step_mixes_no_devices(case: str) -> None:
    """Steps, evaluation, a round's change and a restart compute there what the CPU computes."""
    found = told()[case]

    assert found["error"] == ""
    assert found["differences"]
    assert max(found["differences"]) < BOUND


@pytest.mark.parametrize("case", DEVICES)
def test_a_device_waits_for_what_leaves_it(case: str) -> None:
    """In a step a device waits for its two tensors, for the loss, and for its gradient's norm."""
    found = waits(case)

    assert found.pop(DOWN, 0) <= 2
    assert all(found[why] <= NUMBERS[why] for why in found)


@pytest.mark.parametrize("case", ENGINES)
def test_a_wave_waits_once_however_many_devices_it_has(case: str) -> None:
    """Beside what leaves for each device, a wave of three waits as often as a wave of one."""
    found = waits(case)
    waves = 2  # one with the labels here, one with the labels there

    assert found.pop(DOWN) == 3 * (1 + 2)
    assert all(found[why] <= waves * NUMBERS[why] for why in found)

"""Steps of both sides of the cut on the CPU and on a device of its own, for `test_far_device.py`.

    python -m tests.far_steps CASE...

Prints a JSON object: for each case what went wrong, and what threads had to wait for.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from coordinator.engine.interface import Job
from coordinator.engine.local import LocalEngine
from edge_sdk.lora.adapters import initial_pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.model.quantized import resolve_base
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig
from tests.far_device import NAME, Far, register
from tests.tiny import BLOCKS, make_config, make_micro, make_model, make_parts, num_targets, task_of

LORA = LoraConfig(r=4, lora_alpha=8)
TRAINING = TrainingConfig(learning_rate=1e-2)
STEPS = 2
Numbers = list[np.ndarray]
Where = Far | str | None
"""The device of its own, another one by name, or the CPU."""


class Known:
    """A tiny model and what is known of it."""

    def __init__(self, family: str) -> None:
        self.config, self.task = make_config(family), task_of(family)
        self.layout = find_layout(self.config, self.task)
        self.model = make_model(self.config, self.task)
        self.shapes = find_targets(self.config, self.task, self.layout, LORA)

    def parts(self, names: list[str]) -> dict[str, Any]:
        """Tensors by part."""
        return make_parts(self.model, self.layout, names)

    def ranks(self, blocks: range) -> dict[str, int]:
        """Rank of every weight of some blocks."""
        prefixes = tuple(f"{self.layout.blocks_path}.{i}." for i in blocks)
        return {n: LORA.r for n in self.shapes if n.startswith(prefixes)}

    def changes(self, blocks: range) -> dict[str, Factors]:
        """A change of every weight of some blocks."""
        generator = np.random.default_rng(0)
        found = {}
        for name in self.ranks(blocks):
            pair = initial_pair(name, 2, self.shapes[name], seed=1)
            b_OR = generator.normal(0, 0.05, pair.b_OR.shape).astype(np.float32)
            found[name] = Factors(b_OR, pair.a_RI)
        return found


def everything(state: Any) -> Numbers:
    """What a checkpoint holds, in order of its names."""
    return [np.asarray(state[name]) for name in sorted(state)]


def counted(where: Where) -> AbstractContextManager[None]:
    """Count what is waited for, if this is on the device of its own."""
    return where.counting() if isinstance(where, Far) else nullcontext()


def run_device(family: str, where: Where, *, split: int = 2, **options: Any) -> Numbers:
    """Steps and an evaluation of the part of a device, with the tail; a round; a restart."""
    known, device = Known(family), name_of(where)
    blocks = range(split)
    plan = Plan(
        split=split, ranks=known.ranks(blocks), alphas={}, batch_size=4, micro_batch=4, tail=True
    )
    parts = known.parts(["front", *(f"block.{i}" for i in blocks), "tail"])
    settings = (known.config, known.task, known.layout, parts, plan, LORA, TRAINING, 10)
    torch.manual_seed(0)
    runtime = TorchRuntime(*settings, device=device, **options)
    runtime.state.meter.measure("free", 1)
    runtime.state.begin_round()
    found: Numbers = []
    for step in range(STEPS):
        micro = make_micro(known.task, step)
        with counted(where if step else None):
            if split == BLOCKS:
                found.append(np.array(runtime.local(micro, num_targets(micro), step, 0)))
            else:
                hidden_BTD = runtime.forward(micro, step, 0)
                sums, grad_BTD = runtime.tail(hidden_BTD, micro, num_targets(micro))
                runtime.backward(grad_BTD)
                found += [hidden_BTD, np.array(sums), grad_BTD]
            runtime.step(step)
    runtime.state.merge_change(known.changes(blocks))
    runtime.state.restore(runtime.state.checkpoint())
    micro = make_micro(known.task, STEPS)
    found.append(np.array(runtime.tail_eval(runtime.forward_eval(micro), micro)))
    return [*found, *everything(runtime.state.checkpoint())]


def run_engine(
    family: str,
    where: Where,
    *,
    labels: str = "server",
    base: Any = "float32",
    form: Any = "free",
) -> Numbers:
    """Steps and an evaluation of devices cut at 1, 2 and 4, with a round and a restart."""
    known, device = Known(family), name_of(where)
    dtype, quantized = resolve_base(base, torch.float32)
    slice_ = Slice(known.config, known.task, known.layout, dtype, torch.device(device), quantized)
    for name, tensors in known.parts(list(known.layout.part_names())).items():
        slice_.add(name, tensors)
    own = range(1, BLOCKS)
    torch.manual_seed(0)
    trains_head = labels == "server"
    settings = (slice_, 1, known.ranks(own), LORA, TRAINING, 10)
    engine = LocalEngine(*settings, trains_head=trains_head, compute="float32")
    engine.trained.meter.measure(form, 1)
    engine.begin(engine.learned().pairs)
    jobs = [make_job(known, f"d{i}", split) for i, split in enumerate((1, 4, 2))]
    if labels == "device":
        jobs = list(map(without_labels, jobs))
    found: Numbers = []
    for step in range(STEPS):
        with counted(where if step else None):
            if labels == "server":
                answers = engine.train(jobs, step, 0)
            else:
                hidden = engine.forward(jobs, step, 0)
                found += hidden.values()
                answers = engine.backward({place: np.tanh(h) for place, h in hidden.items()})
            engine.finish_step(step)
        found += [answer.grad_BTD for answer in answers]
        found += [np.array(answer.sums) for answer in answers if answer.sums is not None]
    engine.take(known.changes(own), {}, engine.learned().head)
    engine.load_state(engine.state())
    found.append(np.asarray(engine.evaluate(jobs[0])))
    found.append(np.array(engine.evaluate_whole(make_micro(known.task, 0))))
    found += everything(engine.state())
    if labels == "device":
        return found
    return found + run_engine(family, where, labels="device", base=base, form=form)


def make_job(known: Known, name: str, split: int) -> Job:
    """What a device sends; half of the positions are wanted where labels stay."""
    generator = np.random.default_rng(split)
    micro = make_micro(known.task, split, rows=2, longest=5 + split)
    hidden = generator.normal(size=(*micro.input_ids.shape, 32)).astype(np.float32)
    job = Job(name, split, 2.0, num_targets(micro), hidden, micro.lengths, micro.labels)
    if known.layout.needs_ids:
        job = replace(job, ids_BT=micro.input_ids.astype(np.int32))
    return job


def without_labels(job: Job) -> Job:
    """The same where labels stay on the device, which wants every other state."""
    wanted = np.zeros(job.hidden_BTD.shape[:2], bool)
    wanted[:, ::2] = True
    return replace(job, labels=None, wanted_BT=wanted)


def run_absent(where: Where) -> Numbers:
    """Bytes of embeddings and head that are not here, of a slice that has only blocks."""
    known = Known("qwen3")
    device = torch.device(name_of(where))
    slice_ = Slice(known.config, known.task, known.layout, torch.float32, device)
    absent = [slice_.model.get_parameter(n) for n in (*known.layout.front, *known.layout.tail)]
    own: list[Any] = [getattr(tensor, "here", tensor) for tensor in absent]
    return [np.array([tensor.untyped_storage().nbytes() for tensor in own])]


CASES: dict[str, Callable[[Where], Numbers]] = {
    "absent parts": run_absent,
    "device llama": partial(run_device, "llama"),
    "device llama alone": partial(run_device, "llama", split=BLOCKS),
    "device llama again": partial(run_device, "llama", recompute=True),
    "device llama int8": partial(run_device, "llama", base="int8"),
    "device llama int4": partial(run_device, "llama", base="int4"),
    "device mixtral": partial(run_device, "mixtral"),
    "device bert": partial(run_device, "bert"),
    "engine llama": partial(run_engine, "llama"),
    "engine llama int4": partial(run_engine, "llama", base="int4"),
    "engine gpt2": partial(run_engine, "gpt2", form="reference"),
    "engine mixtral": partial(run_engine, "mixtral"),
    "engine bert": partial(run_engine, "bert"),
}


def name_of(where: Where) -> str:
    """Return where a case is to compute."""
    if isinstance(where, Far):
        return f"{NAME}:0"
    return where or "cpu"


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative difference of two arrays."""
    wide, whole = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(wide - whole) / max(np.linalg.norm(whole), 1e-6))


def main(names: list[str]) -> None:
    """Run the cases, and say what was found."""
    register()
    told = {}
    for name in names or CASES:
        expected = CASES[name](None)
        try:
            with Far() as far:
                found = CASES[name](far)
        except Exception as error:  # noqa: BLE001 - told of
            lines = traceback.format_exception(error)
            told[name] = {"error": "".join(lines)[-3000:], "waits": [], "differences": []}
            continue
        differences = [difference(a, b) for a, b in zip(found, expected, strict=True)]
        told[name] = {"error": "", "waits": far.waits, "differences": differences}
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])

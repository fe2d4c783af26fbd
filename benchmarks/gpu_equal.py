"""What has to be equal on a GPU, for `gpu.py`: each function returns its largest difference.

Everything in float32, where products round little: the same blocks in other company, or cut
elsewhere, are the same numbers in another order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_models import PLAIN_SGD, Model

from edge_sdk.errors import is_out_of_memory

ROWS, LENGTH = 2, 24


def difference(found: Iterable[Any], expected: Iterable[Any]) -> float:
    """Return the largest relative difference of two lists of arrays."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(found, expected, strict=True)
    ]
    assert pairs, "nothing was compared"
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)) for a, b in pairs)


def factors(*states: Any) -> dict[str, np.ndarray]:
    """Return the trained factors of both sides, by name."""
    return {n: v for state in states for n, v in state.items() if n.startswith("own:")}


def split_is_whole(model: Model, compute: Any = "float32", base: Any = "float32") -> float:
    """A step through a cut, against the same step on a device that holds all blocks."""
    blocks, split = model.shape.blocks, model.shape.split
    micro = model.micro(ROWS, LENGTH)
    targets = ROWS * (LENGTH - 1)
    whole = model.runtime(blocks, compute, base, PLAIN_SGD)
    front = model.runtime(split, compute, base, PLAIN_SGD)
    engine = model.engine(split, compute, base, PLAIN_SGD)
    start = whole.state.adapters.pairs()
    front.state.adapters.load_pairs({n: start[n] for n in front.state.adapters.ranks})
    engine.begin({n: start[n] for n in engine.ranks})
    loss = whole.local(micro, targets, 0, 0).loss_sum
    whole.step(0)
    (job,) = model.jobs([split], ROWS, LENGTH)
    hidden_BTD = front.forward(micro, 0, 0)
    sent = replace(job, hidden_BTD=hidden_BTD, labels=micro.labels)
    (answer,) = engine.train([sent], 0, 0)
    engine.finish_step(0)
    front.backward(answer.grad_BTD)
    front.step(0)
    assert answer.sums is not None
    found = factors(front.state.checkpoint(), engine.state())
    expected = factors(whole.state.checkpoint())
    names = sorted(expected)
    learned = difference([found[n] for n in names], [expected[n] for n in names])
    return max(learned, abs(answer.sums.loss_sum / loss - 1))


def mixed_is_alone(model: Model) -> float:
    """A wave of devices with four cuts, against each of them in a wave of its own."""
    blocks = model.shape.blocks
    cuts = [1, blocks - 1, 2, 1]
    engine = model.engine(1, "float32", "float32", PLAIN_SGD)
    jobs = model.jobs(cuts, ROWS, LENGTH)
    together = engine.train(jobs, 0, 0)
    grads = {n: p.grad.clone() for n, p in engine.trained.optimizer.parameters.items()}
    engine.open_step.clear()
    engine.trained.optimizer.forget_gradients()
    # In the order of the answers: by cut, then by name.
    alone = [
        engine.train([job], 0, 0)[0] for job in sorted(jobs, key=lambda j: (j.split, j.device))
    ]
    summed = {n: p.grad for n, p in engine.trained.optimizer.parameters.items()}
    return max(
        difference([a.grad_BTD for a in together], [a.grad_BTD for a in alone]),
        difference([a.sums for a in together], [a.sums for a in alone]),
        difference(
            [grads[n].cpu().numpy() for n in grads], [summed[n].cpu().numpy() for n in grads]
        ),
    )


def here_is_there(model: Model) -> float:
    """A wave on the GPU, against the same wave with the same weights on the CPU."""
    jobs = model.jobs([1, 2], ROWS, LENGTH)
    there = model.engine(1, "float32", "float32", PLAIN_SGD)
    on_cpu = Model(model.shape, torch.device("cpu"), torch.float32)
    on_cpu.weights = _OnCpu(model.weights)  # type: ignore[assignment]
    here = on_cpu.engine(1, "float32", "float32", PLAIN_SGD)
    here.begin(there.learned().pairs)
    found, expected = there.train(jobs, 0, 0), here.train(jobs, 0, 0)
    return difference([a.grad_BTD for a in found], [a.grad_BTD for a in expected])


class _OnCpu(dict[str, torch.Tensor]):
    """Weights that were drawn on a GPU, whose generator gives other numbers, on the CPU."""

    def __init__(self, drawn: Any) -> None:
        super().__init__({name: drawn[name].cpu() for name in drawn})


def resumed_goes_on(model: Model) -> float:
    """Both sides after three steps, against both sides that were restored after the second."""
    split = model.shape.split
    micro, jobs = model.micro(ROWS, LENGTH), model.jobs([split], ROWS, LENGTH)

    def step(runtime: Any, engine: Any, number: int) -> None:
        runtime.forward(micro, number, 0)
        (answer,) = engine.train(jobs, number, 0)
        engine.finish_step(number)
        runtime.backward(answer.grad_BTD)
        runtime.step(number)

    def both() -> tuple[Any, Any]:
        runtime = model.runtime(split, "float32", "float32")
        runtime.state.begin_round()
        engine = model.engine(split, "float32", "float32")
        engine.begin(engine.learned().pairs)
        return runtime, engine

    straight, stopped, restored = both(), both(), both()
    for pair in (straight, stopped):
        for number in range(2):
            step(*pair, number)
    restored[0].state.restore(stopped[0].state.checkpoint())
    restored[1].load_state(stopped[1].state())
    for pair in (straight, restored):
        step(*pair, 2)
    states = [factors(r.state.checkpoint(), e.state()) for r, e in (restored, straight)]
    return difference(states[0].values(), states[1].values())


def exhausted_is_told(model: Model) -> str:
    """Let a device run out of memory, and go on with less; returns what the error said."""
    device = model.device
    runtime = model.runtime(model.shape.split, "float32", "float32")
    runtime.forward(model.micro(1, LENGTH), 0, 0)
    runtime.state.begin_round()
    if device.type != "cuda":
        try:
            torch.empty(1 << 62, dtype=torch.uint8)
        except RuntimeError as error:
            return _told(error)
        raise AssertionError("the CPU gave more memory than there is")
    total = torch.cuda.mem_get_info(device)[1]
    allowed = torch.cuda.memory_reserved(device) + (64 << 20)
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    said = ""
    try:
        runtime.forward(model.micro(256, 2048), 0, 0)
    except RuntimeError as error:
        said = _told(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert said, "memory was not exhausted"
    runtime.state.begin_round()
    torch.cuda.empty_cache()
    assert np.isfinite(runtime.forward(model.micro(1, LENGTH), 0, 0)).all()
    return said


def _told(error: Exception) -> str:
    if not is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"

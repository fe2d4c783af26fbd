"""What an optimizer can do in a round bounds what any honest device brings, whatever it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.reach import ENDLESS, adamw_step, reach_of
from coordinator.aggregation.screening import Screening, beyond_reach
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.exchange import Known, moved
from edge_sdk.lora.targets import LoraConfig, Shape
from edge_sdk.protocol.codecs import as_read
from edge_sdk.runtime.numpy_optimizer import NumpyOptimizer
from edge_sdk.runtime.training import TrainingConfig

SHAPE, STEPS, ROUNDS = Shape(70, 40), 6, 4
LORA = LoraConfig(r=4)


def gradients(kind: str, shapes: dict[str, Any], seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Gradients of an endless training: what AdamW goes far with, and what it does not."""
    generator = np.random.default_rng(seed)
    signs = {name: generator.choice([-1.0, 1.0], shape) for name, shape in shapes.items()}
    step = 0
    while True:
        step += 1
        size = {
            "growing": 1e-6 * 1.1099**step,  # by b2 / b1 in each step: the worst there is
            "spiking": 1e3 if step % 5 == 0 else 1e-9,
            "vanishing": 1e-30,
            "steady": 1.0,
            "noisy": 0.1,
        }[kind]
        yield {
            name: np.asarray(
                size * (generator.normal(size=shape) if kind == "noisy" else signs[name]),
                np.float32,
            )
            for name, shape in shapes.items()
        }


class Device:
    """A device that does what it should, with the optimizer that it has."""

    def __init__(self, config: TrainingConfig, rank: int, codec: str, kind: str, seed: int) -> None:
        begin = initial_pair("w", rank, SHAPE, seed=0)
        self.held = {"w.A": begin.a_RI.copy(), "w.B": begin.b_OR.copy()}
        self._optimizer = NumpyOptimizer(self.held, config, STEPS * ROUNDS)
        shapes = {name: array.shape for name, array in self.held.items()}
        self._gradients, self._known = gradients(kind, shapes, seed), Known(codec)
        self._known.begin({"w": begin}, {})

    def round(self, number: int) -> dict[str, Pair]:
        """Train a round; return what is sent, less what the coordinator has of it."""
        for step in range(number * STEPS, (number + 1) * STEPS):
            for name, gradient in next(self._gradients).items():
                self._optimizer.add_gradient(name, gradient)
            self._optimizer.step(step)
        changes = self._known.changes({"w": Pair(self.held["w.A"].copy(), self.held["w.B"].copy())})
        self._known.told(changes)
        return changes


def screening(config: TrainingConfig, codec: str = "float32", factor: float = 0.0) -> Screening:
    """What a run of that optimizer holds uploads against."""
    return Screening(config, STEPS, STEPS * ROUNDS, codec, LORA.scale, factor)


CONFIGS = st.builds(
    TrainingConfig,
    optimizer=st.sampled_from(["adamw", "sgd"]),
    learning_rate=st.sampled_from([1e-6, 1e-3, 0.1, 3.0]),
    lr_scheduler_type=st.sampled_from(["constant", "linear", "cosine"]),
    warmup_steps=st.sampled_from([0, 5, 30]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    adam_beta1=st.sampled_from([0.0, 0.9, 0.95]),
    adam_beta2=st.sampled_from([0.9, 0.99, 0.999]),
    adam_epsilon=st.sampled_from([1e-8, 1e-12]),
    max_grad_norm=st.sampled_from([0.0, 0.1, 1.0]),
)
KINDS = ["growing", "spiking", "vanishing", "steady", "noisy"]
CODECS = ["float32", "bfloat16", "int8", "int4"]


@given(
    CONFIGS,
    st.sampled_from([1, 4, 16]),
    st.sampled_from(CODECS),
    st.sampled_from(KINDS),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=300)
def test_no_honest_device_goes_too_far(
    config: TrainingConfig, rank: int, codec: str, kind: str, seed: int
) -> None:
    """Any rate, schedule, rank, optimizer, decay, codec and gradient: nothing is beyond reach."""
    device = Device(config, rank, codec, kind, seed)
    held = {"w": initial_pair("w", rank, SHAPE, seed=0)}

    for number in range(ROUNDS):
        sent = device.round(number)["w"]
        after = {"w": moved(held["w"], Pair(*(as_read(array, codec) for array in sent)))}
        report = Report(2, 8, after)
        brought = screening(config, codec).brought(report, number, held, {})
        assert beyond_reach(brought) == ""
        held = after


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_goes_further_is_seen(optimizer: Any, codec: str) -> None:
    """Numbers some hundred times those of an honest round are beyond reach, and so is one alone."""
    config = TrainingConfig(optimizer=optimizer, learning_rate=1e-3)
    before = {"w": initial_pair("w", 4, SHAPE, seed=0)}
    b_OR = np.zeros((SHAPE[0], 4), np.float32)
    single = b_OR.copy()
    single[3, 2] = 1.0

    everywhere = Report(2, 8, {"w": Pair(before["w"].a_RI, b_OR + 0.3)})
    one = Report(2, 8, {"w": Pair(before["w"].a_RI, single)})

    held = screening(config, codec)
    assert "beyond all measure" in beyond_reach(held.brought(everywhere, 0, before, {}))
    if codec != "int4":  # which spreads a number over its group
        assert "beyond all measure" in beyond_reach(held.brought(one, 0, before, {}))


def test_the_step_of_adamw_is_the_largest_that_there_is() -> None:
    """Gradients that grow by b2 / b1 come close to the bound, and the first step is one rate."""
    most = adamw_step(0.9, 0.999, 1e-8, ENDLESS)
    config = TrainingConfig(learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0)
    held = {"w": np.zeros(1, np.float32)}
    optimizer, largest = NumpyOptimizer(held, config, 1000), 0.0
    for step in range(5060):
        before = float(held["w"][0])
        size = 1e-3 * (0.999 / 0.9) ** max(0, step - 5000)
        optimizer.add_gradient("w", np.array([size if step > 5000 or not step else 0.0]))
        optimizer.step(step)
        largest = max(largest, abs(float(held["w"][0]) - before))
        if not step:
            assert largest == pytest.approx(1.0, rel=1e-4)

    assert 0.95 * most < largest <= most
    assert most == pytest.approx(7.27, abs=0.01)
    assert adamw_step(0.9, 0.999, 1e-8, 20) == pytest.approx(1.16, abs=0.01)
    assert adamw_step(0.9, 0.0, 1e-8, 1000) == math.inf


def test_a_round_without_a_rate_moves_nothing() -> None:
    """A warm-up of one step has a rate of 0 in the first: what has moved all the same is seen."""
    config = TrainingConfig(warmup_steps=5)

    assert reach_of(config, 0, 1, 100, "float32").number == 0.0
    assert reach_of(config, 0, 2, 100, "float32").number > 0.0

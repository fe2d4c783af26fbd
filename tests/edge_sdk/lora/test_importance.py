"""When importance is measured, how reports are joined, and how it is smoothed over rounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coordinator.rounds.validation import check_importance
from edge_sdk.errors import ConfigError, RemoteProtocolError
from edge_sdk.lora.importance import ImportanceMeter, Smoothing, combine
from edge_sdk.protocol.plan import Plan
from tests.edge_sdk.lora.measured import (
    FORMS,
    check,
    make_engine,
    make_runtime,
    wave,
)
from tests.tiny import (
    make_micro,
)

# ---- the meter -----------------------------------------------------------------------------------


def test_values_are_means_of_the_measured_steps_and_survive_a_restart() -> None:
    """Every second step is measured; a checkpoint in between goes on where it stopped."""
    values = []
    runtimes = [make_runtime("llama", 2) for _ in range(2)]
    for runtime in runtimes:
        runtime.state.begin_round()
        runtime.state.meter.measure("free", 2)

    def one(runtime: Any, step: int) -> None:
        hidden = runtime.forward(make_micro("causal-lm", step), step, 0)
        runtime.backward(np.full_like(hidden, 0.1 * (step + 1)))
        runtime.step(step)

    for step in range(4):
        one(runtimes[0], step)
        if step == 1:
            runtimes[1].state.restore(runtimes[0].state.checkpoint())
        if step > 1:
            one(runtimes[1], step)
        single = make_runtime("llama", 2)
        single.state.meter.measure("free", 1)
        one(single, step)
        values.append(single.state.meter.take())
    straight, restored = (runtime.state.meter.take() for runtime in runtimes)

    assert straight == restored
    check(straight, {n: (values[0][n] + values[2][n]) / 2 for n in values[0]})
    assert runtimes[0].state.meter.take() == {}


def test_a_round_that_starts_again_forgets_what_was_measured() -> None:
    """Steps of an abandoned attempt are in no report, nor half a step of it."""
    micro = make_micro("causal-lm", 0)
    for is_complete in (True, False):
        runtime = make_runtime("llama", 2)
        runtime.state.meter.measure("free", 1)
        hidden = runtime.forward(micro, 0, 0)
        runtime.backward(np.ones_like(hidden))
        if is_complete:
            runtime.step(0)

        runtime.state.begin_round()
        runtime.step(1)

        assert runtime.state.meter.take() == {}


def test_the_coordinator_keeps_its_values_through_a_restart() -> None:
    """State taken between two steps holds what was measured."""
    jobs, _, _ = wave("llama")
    engine, restored = make_engine("llama", 1), make_engine("llama", 1)
    for one in (engine, restored):
        one.begin(one.learned().pairs)
        one.trained.meter.measure("free", 1)
    engine.train(jobs, 0, 0)
    engine.finish_step(0)

    restored.load_state(engine.state())

    found = engine.learned().importance
    assert found == restored.learned().importance
    assert found


def test_the_reference_form_is_measured_half_as_often() -> None:
    """With K = 3 steps 0 and 6, where the other forms also take 3 and 9."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    counts = {}
    for form in FORMS:
        meter = ImportanceMeter(model, ["0", "1"], form, 3)
        for step in range(10):
            with meter.watching(step):
                y = model(torch.ones(1, 3))
            y.sum().backward()
            meter.close_step(step)
        counts[form] = int(meter.state()["1"][1])

    assert counts == {"free": 4, "reference": 2, "signed": 4}


@pytest.mark.parametrize(("form", "every"), [("dense", 1), ("free", -1)])
def test_a_form_that_does_not_exist_is_refused(form: Any, every: int) -> None:
    """One line names it and the choice."""
    with pytest.raises(ConfigError, match="choose one of free, reference, signed"):
        ImportanceMeter(nn.Linear(1, 1), [], form, every)


PLAN = Plan(split=2, ranks={"w": 0}, alphas={}, batch_size=8, micro_batch=4)


def test_a_coordinator_takes_honest_importance_only() -> None:
    """Of weights of the plan, bare ones too; never negative, endless or huge."""
    check_importance(PLAN, {})
    check_importance(PLAN, {"w": 0.0})
    with pytest.raises(RemoteProtocolError, match="importance of 'v', which is not in the plan"):
        check_importance(PLAN, {"w": 1.0, "v": 1.0})
    for bad in (-1e-9, math.inf, math.nan, 2e9):
        with pytest.raises(RemoteProtocolError, match=r"importance of 'w': .* outside 0\.\.1e\+09"):
            check_importance(PLAN, {"w": bad})


# ---- arithmetic ----------------------------------------------------------------------------------


def test_combining_is_a_weighted_mean_over_the_holders() -> None:
    """Who does not hold a weight, or has no share of it, counts nothing; names come sorted."""
    reports = {
        "b": (0.25, {"w": 8.0, "v": 1.0}),
        "a": (0.5, {"w": 2.0}),
        "": ({"w": 0.25, "u": 0.0}, {"w": 4.0, "u": 9.0, "t": 9.0}),
    }

    found = combine(reports)

    assert list(found.items()) == [("v", 1.0), ("w", (0.25 * 8 + 0.5 * 2 + 0.25 * 4) / 1.0)]
    assert combine(dict(reversed(reports.items()))) == found
    assert combine({}) == {}


POSITIVE = st.floats(1e-9, 1e6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.fixed_dictionaries({"a": POSITIVE, "b": POSITIVE}), min_size=1, max_size=12))
def test_smoothing_is_the_formula_of_the_paper(rounds: list[dict[str, float]]) -> None:
    """A literal transcription, weight by weight, gives the same numbers."""
    smoothing, T = Smoothing(), len(rounds)
    before: dict[str, float] = {}
    for t, thetas in enumerate(rounds, start=1):
        for name, theta in thetas.items():
            if name not in before:
                before[name] = theta
                continue
            gamma = 1 - math.exp(-(theta * t) / (before[name] * T))
            gamma = min(max(gamma, 0.0), 0.999)
            before[name] = max(1e-12, gamma * before[name] + (1 - gamma) * theta)

        found = smoothing.update(thetas, t, T)

        assert found == pytest.approx(before, rel=1e-12)


def test_a_spike_is_held_back_and_a_fall_accepted() -> None:
    """As the paper's formula says: late a tenfold value moves little, a tenth moves all the way."""
    spike, fall, same = Smoothing(), Smoothing(), Smoothing()
    for one in (spike, fall, same):
        one.update({"w": 1.0}, 9, 10)

    assert spike.update({"w": 10.0}, 10, 10)["w"] < 1.01
    assert fall.update({"w": 0.1}, 10, 10)["w"] < 0.2
    assert same.update({"w": 1.0}, 10, 10)["w"] == pytest.approx(1.0)
    early = Smoothing()
    early.update({"w": 1.0}, 1, 1000)
    assert early.update({"w": 2.0}, 2, 1000)["w"] > 1.99


def test_weights_come_and_go() -> None:
    """A new weight starts with its value; one that nobody measured keeps its own; 0 is floored."""
    smoothing = Smoothing()
    smoothing.update({"b": 2.0}, 1, 4)

    assert smoothing.update({"a": 3.0}, 2, 4) == {"a": 3.0, "b": 2.0}
    assert smoothing.update({}, 3, 4) == {"a": 3.0, "b": 2.0}
    assert Smoothing().update({"a": 0.0}, 1, 4) == {"a": 1e-12}
    with pytest.raises(ValueError, match=r"round t must be in 1\.\.4, got 5"):
        smoothing.update({}, 5, 4)


def test_smoothing_goes_on_from_its_state() -> None:
    """A restored object gives the same bits."""
    smoothing, restored = Smoothing(), Smoothing()
    smoothing.update({"a": 3.0, "b": 0.1}, 1, 3)
    smoothing.update({"a": 2.0, "b": 0.2}, 2, 3)

    restored.load_state(smoothing.state())

    last = {"a": 2.5, "b": 0.3}
    assert restored.update(last, 3, 3) == smoothing.update(last, 3, 3)


def test_the_caps_are_options() -> None:
    """Without a cap a spike is held back for ever, as in the formula as printed."""
    printed = Smoothing(floor=0.0, most_gamma=1.0)
    printed.update({"w": 1.0}, 1, 1)

    assert printed.update({"w": 1e9}, 1, 1)["w"] == 1.0

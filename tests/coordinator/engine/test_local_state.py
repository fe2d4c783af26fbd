"""An engine's state: restored bit for bit, evaluated, and joined with what devices learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from coordinator.aggregation.rules import product
from coordinator.engine.interface import Job
from coordinator.engine.local import LocalEngine
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.runtime.interface import TailSums
from edge_sdk.runtime.training import TrainingConfig
from tests.coordinator.engine.test_local import known, make_engine, make_jobs, warm_pair
from tests.tiny import VOCAB


def test_a_restored_engine_goes_on_bit_for_bit() -> None:
    """Adapters, residuals, head and moments continue as if the engine had never stopped."""
    training = TrainingConfig(learning_rate=1e-2)
    straight, stopped = (make_engine("bert", training) for _ in range(2))
    jobs = make_jobs("bert")
    change = {"bert.encoder.layer.3.output.dense": _random_factors(32, 48)}
    for engine in (straight, stopped):
        engine.train(jobs, 0, 0)
        engine.finish_step(0)
        engine.take(change, {}, {})
    restored = make_engine("bert", training)
    restored.train(jobs, 5, 0)  # a step that was cut off

    restored.load_state({key: value.copy() for key, value in stopped.state().items()})
    for engine in (straight, restored):
        engine.train(jobs, 1, 0)
        engine.finish_step(1)

    first, second = straight.state(), restored.state()
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("base", ["bfloat16", "float16"])
def test_changes_add_up_beside_weights_of_16_bits(base: str) -> None:
    """A weight is what was stored and all changes, rounded once; restored, it has the same bits."""
    training = TrainingConfig(learning_rate=1e-2)
    straight, restored = (make_engine("llama", training, base=base, compute=base) for _ in range(2))
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 3)]  # evaluated, and trained
    stored = {name: straight.slice.stored(f"{name}.weight").float() for name in names}
    change = _random_factors(*known("llama").shapes[names[0]]).scaled(2**-9)
    jobs = make_jobs("llama")

    for step in range(3):  # each change alone would be lost in most numbers of the weight
        straight.train(jobs, step, 0)
        straight.finish_step(step)
        straight.take(dict.fromkeys(names, change), {}, {})
    restored.load_state({key: value.copy() for key, value in straight.state().items()})

    held = {
        name: torch.from_numpy(straight.trained.adapters.residual[name].dense()) for name in names
    }
    due_0 = torch.from_numpy(3 * change.dense())  # of block 3 less what its adapter has learned
    torch.testing.assert_close(held[names[0]], due_0, rtol=1e-5, atol=1e-7)
    for name in names:
        found, due = weight_of(straight, name), (stored[name] + held[name]).to(getattr(torch, base))
        assert found.dtype == due.dtype
        assert (found != due).float().mean() < 0.01  # sums in another order, on the edge of two
        torch.testing.assert_close(found, due, rtol=torch.finfo(due.dtype).eps, atol=0)
        assert torch.equal(found, weight_of(restored, name))
        assert not torch.equal(found, stored[name].to(due.dtype))
    for engine in (straight, restored):
        engine.train(jobs, 3, 0)
        engine.finish_step(3)
    first, second = straight.state(), restored.state()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def weight_of(engine: LocalEngine, name: str) -> torch.Tensor:
    """A copy of the weight that a layer computes with."""
    layer: Any = engine.slice.model.get_submodule(name)
    weight: torch.Tensor = getattr(layer, "base_layer", layer).weight
    return weight.detach().clone()


def _random_factors(num_outputs: int, num_inputs: int) -> Factors:
    generator = np.random.default_rng(0)
    b_OR = generator.normal(size=(num_outputs, 3)).astype(np.float32)
    return Factors(b_OR, generator.normal(size=(3, num_inputs)).astype(np.float32))


def test_evaluation_equals_the_whole_model() -> None:
    """Loss of an evaluation through the split, in either label mode, is the whole model's."""
    engine = make_engine("llama", lora=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5))
    generator = np.random.default_rng(0)
    ids = generator.integers(3, VOCAB, (2, 6))
    lengths = np.array([6, 4], np.int32)
    labels = np.where(np.arange(6)[None] < lengths[:, None], ids, -100)
    with torch.no_grad():
        engine.slice.model.eval()
        hidden = engine.slice.front(torch.from_numpy(ids), torch.from_numpy(lengths), 2).numpy()

    whole = engine.evaluate_whole(MicroBatch(ids, lengths, labels))
    found = engine.evaluate(Job("a", 2, 2.0, 8, hidden, lengths, labels))
    top = engine.evaluate(Job("a", 2, 2.0, 8, hidden, lengths, None))

    assert isinstance(found, TailSums)
    assert found == whole
    assert isinstance(top, np.ndarray)
    assert top.shape == hidden.shape


def test_a_mean_of_blocks_that_are_only_evaluated_is_a_residual() -> None:
    """The coordinator's evaluation sees what devices alone have trained."""
    engine = make_engine("llama", first=2)  # scale: alpha / r = 2
    name = "model.layers.0.mlp.up_proj"
    pair = warm_pair(name, known("llama").shapes[name])

    engine.take({name: product(pair, 2.0)}, {}, {})

    held = engine.trained.adapters.residual[name]
    expected = 2.0 * pair.b_OR @ pair.a_RI
    np.testing.assert_allclose(held.dense(), expected, rtol=1e-5, atol=1e-6)


def test_blocks_of_weights() -> None:
    """A weight's block is the number after the block list's path."""
    engine = make_engine("gpt2")

    assert engine.block_of("transformer.h.3.attn.c_attn.A") == 3
    assert engine.block_of("score.weight") is None
    assert engine.is_present("transformer.h.3.attn.c_attn")

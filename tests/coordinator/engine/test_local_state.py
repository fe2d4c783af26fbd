"""An engine's state: restored bit for bit, evaluated, and joined with what devices learned."""

from __future__ import annotations

import numpy as np
import torch

from coordinator.aggregation.rules import product
from coordinator.engine.interface import Job
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

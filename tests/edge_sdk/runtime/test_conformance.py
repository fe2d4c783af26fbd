"""What every backend promises, and that they compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk.data.batches import MicroBatch
from edge_sdk.errors import ConfigError, NumericError
from edge_sdk.lora.factors import Array
from edge_sdk.runtime.interface import Runtime
from edge_sdk.runtime.onnx_graphs import FOLDED, TRANSPOSED
from profiler.estimate import sizes
from tests.runtimes import (
    BACKENDS,
    LORA,
    SPLIT,
    graphs,
    known,
    make_runtime,
    random_change,
    random_pairs,
)
from tests.tiny import VOCAB, make_micro, num_targets

OTHERS = BACKENDS[1:]
"""All backends but torch, which they are compared with."""
CAUSAL = ("gpt2", "llama", "qwen2")
HIDDEN_TOLERANCE, GRADIENT_TOLERANCE, TRAINED_TOLERANCE = 1e-5, 5e-5, 1e-4


def ranks(index: int) -> int:
    """Ranks from 0 to 4, so that some weights have no adapter."""
    return index % 5


def micro_of(family: str, step: int) -> MicroBatch:
    """Batches of other sizes and lengths at each step, padded on the right."""
    return make_micro(known(family).task, step, rows=1 + step % 4, longest=4 + 3 * (step % 3))


def train(runtime: Runtime, family: str, steps: range) -> list[float]:
    """Steps in which what comes back is the tail's gradient of what went out."""
    losses = []
    for step in steps:
        micro = micro_of(family, step)
        top = runtime.forward(micro, step, 0)
        sums, grad = runtime.tail(top, micro, num_targets(micro))
        runtime.backward(grad)
        runtime.step(step)
        losses.append(sums.loss_sum)
    return losses


def learned(runtime: Runtime) -> Array:
    """All trained numbers in one vector."""
    arrays = [array for pair in runtime.state.adapters.pairs().values() for array in pair]
    return np.concatenate([a.ravel() for a in (*arrays, *runtime.state.head().values())])


def relative(found: Array, wanted: Array) -> float:
    """Largest difference over the largest number."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest) -> str:
    """Each backend but torch in its turn."""
    return str(request.param)


def both(other: str, family: str, **options: Any) -> tuple[Runtime, Runtime]:
    """Torch's runtime and another's, with the same factors and residuals."""
    pair = tuple(make_runtime(backend, family, ranks, **options) for backend in ("torch", other))
    for runtime in pair:
        runtime.state.adapters.load_pairs(random_pairs(pair[0]))
        runtime.state.set_residual(random_change(family))
    return pair  # type: ignore[return-value]


# ---- memory ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_in_use_is_that_of_the_process(backend: str) -> None:
    """It grows by what is taken, and its peak stays when that is given back."""
    runtime = make_runtime(backend, "gpt2", ranks)
    before = runtime.memory_in_use()
    taken = np.ones(8 * 2**20)

    during = runtime.memory_in_use()
    del taken

    assert 0 < before.now_bytes <= before.peak_bytes
    assert during.now_bytes - before.now_bytes == pytest.approx(64 * 2**20, rel=0.2)
    assert runtime.memory_in_use().peak_bytes >= 0.99 * during.now_bytes


# ---- equal ----


@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_backends_compute_the_same(other: str, family: str) -> None:
    """Hidden states, losses, hits and every gradient agree, with padding and any batch or rank."""
    # SGD so fast that what moved is the gradient, not the rounding of what it was taken from.
    settings: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1e3}
    settings |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    reference, runtime = both(other, family, **settings)
    before = (
        reference.state.adapters.pairs(),
        {n: v.copy() for n, v in reference.state.head().items()},
    )
    for step in range(4):
        micro = micro_of(family, step)
        wanted, hidden = reference.forward(micro, step, 0), runtime.forward(micro, step, 0)
        np.testing.assert_allclose(hidden, wanted, atol=HIDDEN_TOLERANCE, rtol=0)
        np.testing.assert_allclose(runtime.forward_eval(micro), wanted, atol=HIDDEN_TOLERANCE)
        (sums, grad), (own_sums, own_grad) = (
            r.tail(wanted, micro, num_targets(micro)) for r in (reference, runtime)
        )
        assert own_sums[1:] == sums[1:]
        assert own_sums.loss_sum == pytest.approx(sums.loss_sum, rel=1e-5)
        assert runtime.tail_eval(wanted, micro) == own_sums
        assert relative(own_grad, grad) < GRADIENT_TOLERANCE
        for each in (reference, runtime):
            each.backward(grad)
            each.step(0)
        for name, pair in reference.state.adapters.pairs().items():
            for old, new, own in zip(
                before[0][name], pair, runtime.state.adapters.pairs()[name], strict=True
            ):
                assert relative(own - old, new - old) < GRADIENT_TOLERANCE
        for name, value in reference.state.head().items():
            old = before[1][name]
            assert relative(runtime.state.head()[name] - old, value - old) < GRADIENT_TOLERANCE
        for each in (reference, runtime):
            each.state.adapters.load_pairs(before[0])
            each.state.load_head(before[1])


@pytest.mark.parametrize("family", CAUSAL)
def test_backends_learn_the_same(other: str, family: str) -> None:
    """After 50 AdamW steps with clipping, decay and a schedule the factors agree in L2."""
    reference, runtime = both(other, family, weight_decay=0.01, warmup_steps=5, max_grad_norm=0.5)

    losses, own_losses = (train(r, family, range(50)) for r in (reference, runtime))

    wanted, found = learned(reference), learned(runtime)
    assert np.linalg.norm(found - wanted) < TRAINED_TOLERANCE * np.linalg.norm(wanted)
    np.testing.assert_allclose(own_losses, losses, rtol=1e-4)


@pytest.mark.parametrize("form", ["free", "signed", "reference"])
def test_backends_measure_the_same_importance(other: str, form: Any) -> None:
    """Every form, weights without an adapter included, over the steps that are due."""
    found = []
    for runtime in both(other, "llama"):
        runtime.state.meter.measure(form, 2)
        train(runtime, "llama", range(5))
        found.append(runtime.state.meter.take())
    wanted, own = found

    assert own.keys() == wanted.keys() == known("llama").targets.keys()
    for name, value in wanted.items():
        assert own[name] == pytest.approx(value, rel=1e-3, abs=1e-5 * max(wanted.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_computed_with_in_full(
    other: str, dtype: torch.dtype
) -> None:
    """A base stored in half precision gives what the same numbers give in float32."""
    compare_in_half_precision(other, dtype)


def compare_in_half_precision(other: str, dtype: torch.dtype) -> None:
    """Hidden states, the tail's gradient, and what a step moves."""
    options: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1e3, "max_grad_norm": 0.0}
    reference, runtime = both(other, "gpt2", dtype=dtype, **options)
    before = learned(reference)
    micro = micro_of("gpt2", 2)

    hidden = reference.forward(micro, 0, 0)
    np.testing.assert_allclose(runtime.forward(micro, 0, 0), hidden, atol=HIDDEN_TOLERANCE)
    grads = [r.tail(hidden, micro, num_targets(micro))[1] for r in (reference, runtime)]

    assert relative(grads[1], grads[0]) < GRADIENT_TOLERANCE
    for each in (reference, runtime):
        each.backward(grads[0])
        each.step(0)
    moved = [learned(each) - before for each in (reference, runtime)]
    assert relative(moved[1], moved[0]) < GRADIENT_TOLERANCE


def test_bfloat16_is_copied_where_it_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime as old as 1.19 computes with such weights as a newer one does."""
    name = "onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type"
    monkeypatch.delattr(name, raising=False)

    compare_in_half_precision("onnxruntime", torch.bfloat16)


def test_backends_read_each_others_checkpoints(other: str) -> None:
    """What one has saved the other goes on from, moments and residuals included."""
    reference, runtime = both(other, "llama")
    for each in (reference, runtime):
        each.state.begin_round()
    train(reference, "llama", range(3))
    runtime.state.restore(reference.state.checkpoint())

    losses, own_losses = (train(r, "llama", range(3, 6)) for r in (reference, runtime))

    assert reference.state.checkpoint().keys() == runtime.state.checkpoint().keys()
    np.testing.assert_allclose(own_losses, losses, rtol=1e-5)


# ---- what each promises by itself ----


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in its turn."""
    return str(request.param)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_restored_device_goes_on_bit_for_bit(backend: str, family: str) -> None:
    """Factors, residuals, head and moments continue as if never stopped."""
    straight, stopped = (make_runtime(backend, family, ranks) for _ in range(2))
    stopped.state.adapters.load_pairs(straight.state.adapters.pairs())
    for runtime in (straight, stopped):
        runtime.state.begin_round()
        train(runtime, family, range(2))
        runtime.state.merge_change(random_change(family))
        runtime.state.begin_round()
    restored = make_runtime(backend, family, ranks)

    restored.state.restore(
        {name: value.copy() for name, value in stopped.state.checkpoint().items()}
    )

    assert train(straight, family, range(2, 4)) == train(restored, family, range(2, 4))
    first, second = straight.state.checkpoint(), restored.state.checkpoint()
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_change_is_dw_less_what_was_learned_here(backend: str) -> None:
    """Own factors moved and the change merged: the function is the old one plus the change."""
    runtime, micro = make_runtime(backend, "llama"), micro_of("llama", 2)
    runtime.state.adapters.load_pairs(random_pairs(runtime))
    runtime.state.begin_round()
    twin = make_runtime(backend, "llama")
    twin.state.adapters.load_pairs(runtime.state.adapters.pairs())
    twin.state.set_residual(random_change("llama"))

    train(runtime, "llama", range(3))
    runtime.state.merge_change(random_change("llama"))

    np.testing.assert_allclose(runtime.forward_eval(micro), twin.forward_eval(micro), atol=2e-5)


def test_micro_batches_add_up(backend: str) -> None:
    """Two micro-batches before a step move the factors by the sum of what each would."""
    micros = [micro_of("llama", 1), micro_of("llama", 2)]
    options: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    moved = []
    for chosen in ([0, 1], [0], [1]):
        runtime = make_runtime(backend, "llama", **options)
        runtime.state.adapters.load_pairs(random_pairs(runtime))
        before = learned(runtime)
        for index in chosen:
            top = runtime.forward(micros[index], 0, index)
            runtime.backward(runtime.tail(top, micros[index], 10)[1])
        runtime.step(0)
        moved.append(learned(runtime) - before)

    assert relative(moved[0], moved[1] + moved[2]) < 1e-4


def test_evaluation_changes_nothing(backend: str) -> None:
    """The same numbers every time, and no gradient is left."""
    runtime, micro = make_runtime(backend, "llama"), micro_of("llama", 0)
    before = learned(runtime)

    first, second = runtime.forward_eval(micro), runtime.forward_eval(micro)
    assert np.array_equal(first, second)
    assert runtime.tail_eval(first, micro) == runtime.tail_eval(second, micro)
    runtime.step(0)

    assert np.array_equal(learned(runtime), before)


def test_a_tail_in_pieces_is_the_tail_at_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two targets at a time, as with a very large vocabulary, give loss, hits and gradient."""
    found = {}
    for count in (2, 1000):
        monkeypatch.setattr(sizes, "TAIL_LOGITS", count * VOCAB)
        runtime, micro = make_runtime(backend, "llama"), micro_of("llama", 0)
        top = runtime.forward_eval(micro)
        found[count] = runtime.tail(top, micro, micro.num_targets)

    (sums, gradient), predicts_BT = found[2], micro.predicts
    assert predicts_BT is not None
    assert runtime.has_local_tail
    assert sums.loss_sum == pytest.approx(found[1000][0].loss_sum, rel=1e-6)
    assert sums[1:] == found[1000][0][1:]
    assert relative(gradient, found[1000][1]) <= 1e-6
    assert not gradient[~predicts_BT].any()


def test_a_gradient_that_is_not_finite_changes_nothing(backend: str) -> None:
    """The step is named, and factors and moments stay."""
    runtime, micro = make_runtime(backend, "llama"), micro_of("llama", 0)
    before = {name: value.copy() for name, value in runtime.state.checkpoint().items()}
    runtime.backward(np.full_like(runtime.forward(micro, 3, 0), np.nan))

    with pytest.raises(NumericError, match="step 3: a gradient"):
        runtime.step(3)

    assert all(
        np.array_equal(value, before[name]) for name, value in runtime.state.checkpoint().items()
    )


def test_a_round_begins_without_leftovers(backend: str) -> None:
    """The gradients of a step that was given up move nothing."""
    runtime, micro = make_runtime(backend, "llama"), micro_of("llama", 0)
    before = learned(runtime)
    runtime.backward(np.ones_like(runtime.forward(micro, 0, 0)))

    runtime.state.begin_round()
    runtime.step(0)

    assert np.array_equal(learned(runtime), before)


def test_a_device_without_adapters_passes_gradients_by(backend: str) -> None:
    """Rank 0 everywhere: nothing to train, nothing fails."""
    runtime, micro = make_runtime(backend, "llama", lambda _: 0), micro_of("llama", 0)

    runtime.backward(np.ones_like(runtime.forward(micro, 0, 0)))
    runtime.step(0)

    assert runtime.state.adapters.pairs() == {}


def test_a_micro_batch_without_targets_costs_nothing(backend: str) -> None:
    """No label anywhere: loss 0, gradient 0."""
    runtime, micro = make_runtime(backend, "llama"), micro_of("llama", 0)
    silent = micro._replace(labels=np.full_like(micro.labels, -100))

    sums, grad = runtime.tail(runtime.forward(silent, 0, 0), silent, 5)

    assert sums == (0.0, 0, 0)
    assert not grad.any()


def test_pruning_pulls_at_the_tail_ranks(backend: str) -> None:
    """With HetLoRA's penalty the tail of every adapter shrinks faster than without."""
    norms = []
    for penalty in (0.0, 5.0):
        runtime = make_runtime(
            backend,
            "llama",
            optimizer="sgd",
            learning_rate=1e-2,
            rank_penalty=penalty,
            rank_kept=0.5,
        )
        runtime.state.adapters.load_pairs(random_pairs(runtime))
        train(runtime, "llama", range(1))
        norms.append([np.linalg.norm(p.a_RI[2:]) for p in runtime.state.adapters.pairs().values()])

    assert all(with_ < without for without, with_ in zip(*norms, strict=True))


# ---- onnxruntime's own ----


def test_blocks_of_one_kind_share_their_graphs() -> None:
    """Both blocks of the slice run the same three graphs, with residuals inside or beside."""
    found = graphs("llama")

    assert found.about.kinds == (0,) * SPLIT
    shared = {"block.0", "vjp.0", "measure.0"}
    folded = {f"{FOLDED}{name}" for name in shared}
    assert found.models.keys() == {"front", "tail", TRANSPOSED, *shared, *folded}


def test_dropout_is_refused() -> None:
    """One line that names the setting."""
    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.protocol.plan import Plan
    from edge_sdk.runtime.onnx_runtime import OnnxRuntime
    from edge_sdk.runtime.training import TrainingConfig

    plan = Plan(split=SPLIT, ranks={}, alphas={}, batch_size=1, micro_batch=1)
    lora = LoraConfig(r=LORA.r, lora_dropout=0.1)
    with pytest.raises(ConfigError, match=r"lora.lora_dropout: .* set it to 0"):
        OnnxRuntime(graphs("llama"), known("llama").mapped, plan, lora, TrainingConfig(), 1)

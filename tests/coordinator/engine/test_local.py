"""Devices that share a wave get exactly what each alone would get."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from coordinator.engine.interface import Answer, DeviceFault, Job
from coordinator.engine.local import LocalEngine
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.targets import LoraConfig, Shape, find_targets
from edge_sdk.model.layout import Layout, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.runtime.transfers import StreamTransfers
from tests.edge_sdk.runtime.late_streams import LateStreams
from tests.tiny import BLOCKS, CLASSES, VOCAB, make_config, make_model, make_parts, task_of

LORA = LoraConfig(r=4, lora_alpha=8)
SGD = TrainingConfig(
    optimizer="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0
)
FAMILIES = ["llama", "gpt2", "bert", "mixtral"]
RELATIVE = 1e-6
HIDDEN = 32


class Known:
    """A tiny model, looked at once."""

    def __init__(self, family: str) -> None:
        self.config, self.task = make_config(family), task_of(family)
        self.layout: Layout = find_layout(self.config, self.task)
        self.model = make_model(self.config, self.task)
        self.shapes: dict[str, Shape] = find_targets(self.config, self.task, self.layout, LORA)


@cache
def known(family: str) -> Known:
    """The tiny model of a family."""
    return Known(family)


def make_engine(
    family: str,
    training: TrainingConfig = SGD,
    lora: LoraConfig = LORA,
    first: int = 1,
    **options: Any,
) -> LocalEngine:
    """An engine with warm adapters in every block that it trains; the whole model is present.

    `base` is a dtype in which its weights are kept.
    """
    k = known(family)
    slice_ = Slice(k.config, k.task, k.layout, getattr(torch, options.pop("base", "float32")))
    for name, tensors in make_parts(k.model, k.layout, list(k.layout.part_names())).items():
        slice_.add(name, tensors)
    prefixes = tuple(f"{k.layout.blocks_path}.{i}." for i in range(first, BLOCKS))
    ranks = {n: LORA.r for n in k.shapes if n.startswith(prefixes)}
    options = {"trains_head": True, **options}
    engine = LocalEngine(slice_, first, ranks, lora, training, 10, **options)
    engine.begin({n: warm_pair(n, k.shapes[n]) for n in ranks})
    return engine


def warm_pair(name: str, shape: Shape) -> Pair:
    """Factors with B away from zero."""
    pair = initial_pair(name, LORA.r, shape, seed=0)
    b_OR = np.random.default_rng(len(name)).normal(0, 0.05, pair.b_OR.shape)
    return Pair(pair.a_RI, b_OR.astype(np.float32))


def make_job(family: str, name: str, split: int, rows: int, longest: int, weight: float) -> Job:
    """A device's micro-batch of its own size and length."""
    generator = np.random.default_rng([split, rows, longest])
    hidden = generator.normal(size=(rows, longest, HIDDEN)).astype(np.float32)
    lengths = generator.integers(2, longest + 1, rows).astype(np.int32)
    lengths[0] = longest
    if task_of(family) == "sequence-classification":
        labels = generator.integers(0, CLASSES, rows).astype(np.int32)
        return Job(name, split, weight, rows, hidden, lengths, labels)
    labels = generator.integers(3, VOCAB, (rows, longest)).astype(np.int32)
    labels[np.arange(longest)[None] >= lengths[:, None]] = -100
    return Job(name, split, weight, int((labels[:, 1:] != -100).sum()), hidden, lengths, labels)


def make_jobs(family: str) -> list[Job]:
    """Devices with different splits, lengths and batch sizes."""
    return [
        make_job(family, "a", 1, rows=2, longest=7, weight=2.0),
        make_job(family, "b", 4, rows=3, longest=9, weight=6.0),
        make_job(family, "c", 2, rows=1, longest=5, weight=1.0),
        make_job(family, "d", 2, rows=4, longest=3, weight=4.0),
    ]


def gradients(engine: LocalEngine) -> dict[str, np.ndarray]:
    """What one step of SGD with rate 1 subtracts: the gradients after `finish_step`."""
    before = {n: p.detach().numpy().copy() for n, p in engine.trained.optimizer.parameters.items()}
    assert engine.finish_step(0)
    after = {n: p.detach().numpy() for n, p in engine.trained.optimizer.parameters.items()}
    return {n: before[n].astype(np.float64) - after[n] for n in before}


def raw_gradients(engine: LocalEngine) -> dict[str, np.ndarray]:
    """The gradients that have been accumulated, unweighted by samples."""
    found = engine.trained.optimizer.parameters.items()
    return {n: p.grad.numpy().astype(np.float64) for n, p in found if p.grad is not None}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative difference of two arrays."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_device_gets_what_it_would_get_alone(family: str) -> None:
    """In a mixed wave loss and gradient of each device are its own to 1e-6."""
    jobs = make_jobs(family)
    engine = make_engine(family)

    together = {a.device: a for a in engine.train(jobs, 0, 0)}

    for job in jobs:
        (alone,) = engine.train([job], 0, 0)
        mine = together[job.device]
        assert mine.grad_BTD.shape == job.hidden_BTD.shape
        assert error(mine.grad_BTD, alone.grad_BTD) <= RELATIVE
        assert mine.sums is not None
        assert alone.sums is not None
        assert mine.sums.loss_sum == pytest.approx(alone.sums.loss_sum, rel=RELATIVE)
        assert mine.sums[1:] == alone.sums[1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_gets_the_mean_over_who_is_served(family: str) -> None:
    """The gradient of block l is the sample-weighted mean over devices that leave l to us."""
    jobs = make_jobs(family)
    alone = {}
    for job in jobs:
        engine = make_engine(family)
        engine.train([job], 0, 0)
        alone[job.device] = {n: g / job.weight for n, g in raw_gradients(engine).items()}
    engine = make_engine(family)

    engine.train(jobs, 0, 0)
    for name, parameter in engine.trained.optimizer.parameters.items():
        assert parameter.grad is not None, name
    found = {}
    served = jobs
    raw = raw_gradients(engine)
    for name in raw:
        block = engine.block_of(name)
        here = [j for j in served if block is None or j.split <= block]
        total = sum(j.weight for j in here)
        found[name] = sum(j.weight / total * alone[j.device][name] for j in here)
    moved = gradients(engine)

    for name, expected in found.items():
        # SGD with rate 1 moves by the gradient; the subtraction itself is in float32.
        tolerance = 1e-6 * np.linalg.norm(expected) + 3e-6
        assert np.linalg.norm(moved[name] - expected) <= tolerance, name
        block = engine.block_of(name)
        total = sum(j.weight for j in jobs if block is None or j.split <= block)
        assert error(raw[name] / total, np.asarray(expected)) <= 2 * RELATIVE, name


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_order_of_jobs_changes_no_bit(family: str) -> None:
    """Whoever's activation arrives first, answers and gradients are the same bits."""
    jobs = make_jobs(family)
    engines = make_engine(family), make_engine(family)

    answers = [
        {a.device: a for a in engine.train(order, 0, 0)}
        for engine, order in zip(engines, (jobs, jobs[::-1]), strict=True)
    ]

    for name, answer in answers[0].items():
        assert np.array_equal(answer.grad_BTD, answers[1][name].grad_BTD)
        assert answer.sums == answers[1][name].sums
    first, second = (raw_gradients(engine) for engine in engines)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def tail_gradients(
    engine: LocalEngine, jobs: list[Job], tops: dict[Place, np.ndarray]
) -> dict[Place, np.ndarray]:
    """What devices that hold the tail compute: dL/dtop of their own mean loss."""
    grads = {}
    for job in jobs:
        top = torch.from_numpy(tops[job.place]).requires_grad_(True)
        lengths = torch.from_numpy(job.lengths_B)
        logits = engine.slice.logits(top, lengths, BLOCKS)
        assert job.labels is not None
        labels = torch.from_numpy(job.labels.astype(np.int64))
        if labels.dim() == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss / job.num_targets, top)
        grads[job.place] = grad.numpy()
    return grads


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_equal_train(family: str) -> None:
    """With the loss on the devices everything equals the wave with the loss here."""
    jobs = make_jobs(family)
    whole, split = make_engine(family), make_engine(family, trains_head=False)

    expected = {a.device: a for a in whole.train(jobs, 0, 0)}
    tops = split.forward(jobs, 0, 0)
    answers = split.backward(tail_gradients(split, jobs, tops))

    assert {a.device for a in answers} == expected.keys()
    for answer in answers:
        assert answer.sums is None
        assert error(answer.grad_BTD, expected[answer.device].grad_BTD) <= RELATIVE
    theirs = raw_gradients(whole)
    for name, grad in raw_gradients(split).items():
        assert error(grad, theirs[name]) <= RELATIVE, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_device_that_wants_few_positions_gets_what_others_get(family: str) -> None:
    """Whoever names its targets is sent these alone; all gradients are those of whole states."""
    jobs = make_jobs(family)
    wishes = [replace(job, wanted_BT=targets_of(job)) for job in jobs if job.device in "ac"]
    mixed = [*wishes, *(job for job in jobs if job.device in "bd")]
    whole, some = (make_engine(family, trains_head=False) for _ in range(2))

    tops, few = whole.forward(jobs, 0, 0), some.forward(mixed, 0, 0)
    grads = tail_gradients(whole, jobs, tops)
    expected = {a.device: a for a in whole.backward(grads)}
    sent = {j.place: grads[j.place][targets_of(j)] for j in wishes}
    answers = some.backward({**grads, **sent})

    for job in mixed:
        assert few[job.place].shape == job.top_shape
    for job in wishes:
        assert np.array_equal(few[job.place], tops[job.place][targets_of(job)])
        assert np.array_equal(some.evaluate(without_labels(job)), few[job.place])
    for answer in answers:
        assert np.array_equal(answer.grad_BTD, expected[answer.device].grad_BTD)
    theirs = raw_gradients(whole)
    assert all(np.array_equal(g, theirs[name]) for name, g in raw_gradients(some).items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tail_on_all_positions_gives_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models whose tail looks around are trained and evaluated as the others are."""
    jobs = make_jobs(family)
    some = make_engine(family)
    few = {a.device: a for a in some.train(jobs, 0, 0)}
    evaluated = [some.evaluate(job) for job in jobs]
    monkeypatch.setattr(Slice, "has_local_tail", False)
    every = make_engine(family)

    whole = {a.device: a for a in every.train(jobs, 0, 0)}

    for name, answer in whole.items():
        mine = few[name]
        assert error(mine.grad_BTD, answer.grad_BTD) <= RELATIVE
        assert mine.sums is not None
        assert mine.sums == pytest.approx(answer.sums, rel=RELATIVE)
    for mine, job in zip(evaluated, jobs, strict=True):
        assert mine == pytest.approx(every.evaluate(job), rel=RELATIVE)
    theirs = raw_gradients(every)
    assert all(error(g, theirs[name]) <= RELATIVE for name, g in raw_gradients(some).items())


def targets_of(job: Job) -> np.ndarray:
    """Where a job predicts its targets."""
    assert job.labels is not None
    found = np.zeros(job.labels.shape, dtype=bool)
    found[:, :-1] = job.labels[:, 1:] != -100
    return found


def without_labels(job: Job) -> Job:
    """The job of a device that keeps them."""
    return replace(job, labels=None)


def test_a_device_that_leaves_between_forward_and_backward_counts_nothing() -> None:
    """Who sends no gradient is neither in the sum nor in the number of samples."""
    jobs = make_jobs("llama")
    left = [job for job in jobs if job.device != "d"]
    engine, without = (make_engine("llama", trains_head=False) for _ in range(2))
    tops = engine.forward(jobs, 0, 0)
    grads = tail_gradients(engine, left, tops)

    answers = engine.backward(grads)
    without.forward(left, 0, 0)
    without.backward(grads)

    assert {a.device for a in answers} == {"a", "b", "c"}
    found, expected = gradients(engine), gradients(without)
    for name in expected:
        assert np.linalg.norm(found[name] - expected[name]) <= 3e-6, name


@pytest.mark.parametrize("labels", ["server", "device"])
def test_an_empty_wave_completes_its_step(labels: str) -> None:
    """When all devices of a wave have left, what was gathered before is still applied."""
    jobs = make_jobs("llama")
    engine, reference = make_engine("llama"), make_engine("llama")
    for one in (engine, reference):
        one.train(jobs, 0, 0)

    if labels == "server":
        answers: list[Answer] = engine.train([], 0, 1)
    else:
        assert engine.forward([], 0, 1) == {}
        answers = engine.backward({})

    assert answers == []
    found, expected = gradients(engine), gradients(reference)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert engine.finish_step(1)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_micro_batches_add_up_to_their_step(family: str) -> None:
    """A step cut into micro-batches gives the gradients of the whole step at once."""
    jobs = make_jobs(family)
    whole, parts = make_engine(family), make_engine(family)
    whole.train(jobs, 0, 0)

    for micro in range(4):
        wave = []
        for job in jobs:
            if micro < len(job.lengths_B):
                row = slice(micro, micro + 1)
                assert job.labels is not None
                wave.append(
                    Job(
                        job.device,
                        job.split,
                        job.weight,
                        job.num_targets,
                        job.hidden_BTD[row],
                        job.lengths_B[row],
                        job.labels[row],
                    )
                )
        parts.train(wave, 0, micro)

    expected = raw_gradients(whole)
    for name, grad in raw_gradients(parts).items():
        assert error(grad, expected[name]) <= 2 * RELATIVE, name
    moved, reference = gradients(parts), gradients(whole)
    for name in reference:
        assert np.linalg.norm(moved[name] - reference[name]) <= 5e-6, name


def test_a_loss_that_is_not_finite_blames_its_device() -> None:
    """The wave stops before anything is accumulated, and the others can go on without it."""
    jobs = make_jobs("llama")
    spoilt = Job(**{**vars(jobs[1]), "hidden_BTD": np.full_like(jobs[1].hidden_BTD, np.nan)})
    engine, reference = make_engine("llama"), make_engine("llama")
    good = [job for job in jobs if job.device != spoilt.device]

    with pytest.raises(DeviceFault, match="loss of device 'b' is nan") as caught:
        engine.train([*good, spoilt], 0, 0)
    after_fault = raw_gradients(engine)
    engine.train(good, 0, 0)
    reference.train(good, 0, 0)

    assert caught.value.device == "b"
    assert after_fault == {}
    found, expected = gradients(engine), gradients(reference)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_optimizer_skips_what_is_not_finite() -> None:
    """A gradient that is not finite changes nothing, and the next step is as if it never was."""
    engine = make_engine("llama")
    before = engine.state()
    engine.forward(make_jobs("llama"), 0, 0)
    bad = {j.place: np.full(j.hidden_BTD.shape, np.nan, np.float32) for j in make_jobs("llama")}
    engine.backward(bad)

    was_finite = engine.finish_step(0)

    assert not was_finite
    assert all(np.array_equal(value, before[key]) for key, value in engine.state().items())
    assert raw_gradients(engine) == {}


def test_copies_beside_the_computation_change_nothing() -> None:
    """Where every copy is made as late as it may, waves give the same bits, in both label modes."""
    plain, late = make_engine("llama"), make_engine("llama")
    late._transfers = StreamTransfers(torch.device("cpu"), LateStreams())
    jobs = make_jobs("llama")
    wanted = np.arange(9) % 2 == 0
    kept = [
        replace(job, labels=None, wanted_BT=np.broadcast_to(wanted[: h.shape[1]], h.shape[:2]))
        for job, h in ((job, job.hidden_BTD) for job in jobs)
    ]

    def numbers(engine: LocalEngine) -> list[np.ndarray]:
        answers = engine.train(jobs, 0, 0)
        hidden = engine.forward(kept, 0, 1)
        answers += engine.backward({place: np.tanh(h) for place, h in hidden.items()})
        found = [*hidden.values(), *(answer.grad_BTD for answer in answers)]
        return [*found, engine.evaluate(kept[0]), *gradients(engine).values()]

    for found, expected in zip(numbers(late), numbers(plain), strict=True):
        assert np.array_equal(found, expected)

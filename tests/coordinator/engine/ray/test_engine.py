"""Actors in rows, side by side, compute what one process does, and lose nothing when they die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from coordinator.aggregation.ledger import Ledger, Report
from coordinator.aggregation.rules import RULES, SERVER
from coordinator.config.engine import EngineConfig
from coordinator.engine.interface import Answer, DeviceFault, Engine, EngineSpec
from coordinator.engine.local import LocalEngine, make_local
from coordinator.engine.ray.cluster import RayCluster
from coordinator.engine.ray.engine import RayEngine
from coordinator.engine.server_model import engines as engines_of
from edge_sdk.data.batches import MicroBatch
from edge_sdk.errors import ConfigError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import ModelFacts, find_targets
from edge_sdk.protocol.messages import StepReport
from tests.coordinator.engine.ray.engines import Both, assert_equal_states, both
from tests.coordinator.engine.test_local import (
    error,
    make_jobs,
    tail_gradients,
    warm_pair,
    without_labels,
)
from tests.e2e.cluster import PATIENCE_S, Cluster, Trap, save_model, wait_all
from tests.tiny import VOCAB

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2)]
KILLED = {
    (1, 1): "in a wave",
    (2, 1): "before an update",
    (1, 2): "between two waves",
    (2, 2): "in a wave",
}
RELATIVE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def ray_of_all() -> Iterator[None]:
    """One Ray on this machine for all tests of the file: it takes seconds to start."""
    with RayCluster(EngineConfig(kind="ray", cpus_per_actor=0.1), "cpu"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models lie."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "{}x{}".format(*shape))
def pair(request: Any, folder: Path) -> Iterator[Both]:
    """Replicas x stages of actors, beside an engine in this process."""
    with both(folder, "llama", request.param) as made:
        yield made


@pytest.fixture
def engines(pair: Both) -> Both:
    """The two, as they were at first."""
    pair.restart()
    return pair


def go(engine: Engine, tail: LocalEngine, family: str, labels: str, step: int) -> list[Answer]:
    """Run the waves of a step in two halves: all of it, and half of its devices again."""
    jobs, answers = make_jobs(family), list[Answer]()
    again = [replace(job, micro=1) for job in jobs[:2]]
    for wave, own in enumerate((jobs, again)):
        if labels == "server":
            answers += engine.train(own, step, wave)
        else:
            kept = [without_labels(job) for job in own]
            tops = engine.forward(kept, step, wave)
            answers += engine.backward(tail_gradients(tail, own, tops))
    return answers


def assert_equal_answers(found: list[Answer], expected: list[Answer]) -> None:
    """Compare what devices get."""
    assert [(a.device, a.micro) for a in found] == [(a.device, a.micro) for a in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine.grad_BTD, theirs.grad_BTD) <= RELATIVE
        assert (mine.sums is None) == (theirs.sums is None)
        if mine.sums is not None and theirs.sums is not None:
            assert mine.sums.loss_sum == pytest.approx(theirs.sums.loss_sum, rel=RELATIVE)
            assert mine.sums[1:] == theirs.sums[1:]


@pytest.mark.parametrize("labels", ["server", "device"])
def test_steps_equal_those_of_one_process(engines: Both, labels: str) -> None:
    """Answers, weights, moments and importance after two steps are those of one engine."""
    for step in range(2):
        answers = [
            go(e, engines.local, "llama", labels, step) for e in (engines.other, engines.local)
        ]
        assert_equal_answers(*answers)
        assert engines.other.finish_step(step)
        assert engines.local.finish_step(step)

    assert_equal_states(engines.other, engines.local)
    mine, theirs = engines.other.learned(), engines.local.learned()
    assert mine.pairs.keys() == theirs.pairs.keys()
    assert mine.importance == pytest.approx(theirs.importance, rel=1e-4)
    assert engines.other.ranks == engines.local.ranks
    assert engines.other.head_shapes() == engines.local.head_shapes()


@pytest.mark.parametrize("labels", ["server", "device"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_what_rounds_hand_out_is_taken_over(engines: Both, rule: str, labels: str) -> None:
    """What every rule makes of a round arrives in all stages, also in blocks that only evaluate."""
    for engine in (engines.other, engines.local):
        go(engine, engines.local, "llama", labels, 0)
        engine.finish_step(0)
    ledger, reports = joined_with_a_device(engines, rule)
    engines.other.learned()

    result = ledger.aggregate(reports)
    changes, replaced = result.changes_for(SERVER), result.replaced.get(SERVER, {})
    for engine in (engines.other, engines.local):
        engine.take(changes, replaced, result.head, restarts=result.restarts)
        go(engine, engines.local, "llama", labels, 1)
        engine.finish_step(1)

    assert any(".layers.0." in name for name in changes)
    assert_equal_states(engines.other, engines.local)
    assert_equal_evaluations(engines)


def joined_with_a_device(engines: Both, rule: str) -> tuple[Ledger, dict[str, Report]]:
    """Return a round of the coordinator and of a device, before they are joined."""
    source, config = engines.spec.source, engines.config
    targets = find_targets(source.config, config.task, source.layout, config.lora)
    ledger = Ledger(ModelFacts(source.layout, targets), config.lora, rule, None, seed=0)
    split = source.layout.num_blocks if rule == "zeropad" else 2
    own = {
        n: warm_pair(n, s) for n, s in targets.items() if (source.layout.block_of(n) or 0) < split
    }
    moved = {n: Pair(pair.a_RI, 1.1 * pair.b_OR) for n, pair in own.items()}
    ledger.pairs = {SERVER: engines.pairs, "a": own}
    learned = Report(0, 0, *engines.local.learned())
    return ledger, {SERVER: learned, "a": Report(split, 2, moved), "b": Report(0, 5, {})}


def assert_equal_evaluations(engines: Both) -> None:
    """Compare losses of the whole model and of single devices."""
    generator = np.random.default_rng(0)
    ids, lengths = generator.integers(3, VOCAB, (3, 6)), np.array([6, 4, 5], np.int32)
    labels = np.where(np.arange(6)[None] < lengths[:, None], ids, -100)
    micro = MicroBatch(ids, lengths, labels)
    mine, theirs = engines.other.evaluate_whole(micro), engines.local.evaluate_whole(micro)
    assert mine == pytest.approx(theirs, rel=RELATIVE)
    for job in make_jobs(engines.family):
        loss, expected = engines.other.evaluate(job), engines.local.evaluate(job)
        assert loss == pytest.approx(expected, rel=RELATIVE)
        tops = [e.evaluate(without_labels(job)) for e in (engines.other, engines.local)]
        assert error(*map(np.asarray, tops)) <= RELATIVE


def test_checkpoints_pass_between_engines(engines: Both) -> None:
    """What actors have written goes on in one process, and the other way round."""
    go(engines.other, engines.local, "llama", "server", 0)
    engines.other.finish_step(0)
    state = {name: value.copy() for name, value in engines.other.state().items()}
    goes_on = make_local(engines.spec)

    goes_on.load_state(state)
    for engine in (goes_on, engines.other):
        go(engine, engines.local, "llama", "device", 1)
        engine.finish_step(1)
    assert_equal_states(engines.other, goes_on)
    engines.other.load_state(goes_on.state())

    assert_equal_states(engines.other, goes_on, bound=0.0)
    carried = engines.other.carried(), goes_on.carried()
    assert carried[0].moments.keys() == carried[1].moments.keys()


def test_a_loss_that_is_not_finite_leaves_nothing(engines: Both) -> None:
    """The device is named, what others had sent before counts, and of its wave nothing does."""
    jobs = make_jobs("llama")
    spoilt = replace(jobs[1], hidden_BTD=np.full_like(jobs[1].hidden_BTD, np.nan))
    for engine in (engines.other, engines.local):
        engine.train(jobs[2:], 0, 0)
        with pytest.raises(DeviceFault, match="loss of device 'b' is nan") as caught:
            engine.train([jobs[0], spoilt], 0, 1)
        assert caught.value.device == "b"
        engine.train(jobs[:1], 0, 1)
        engine.finish_step(0)

    assert_equal_states(engines.other, engines.local)


def test_an_actor_that_is_killed_costs_nothing_but_time(engines: Both) -> None:
    """Another takes its place, the step is done again, and nothing is counted twice."""
    assert isinstance(engines.other, RayEngine)
    when = KILLED[engines.config.engine.replicas, engines.config.engine.stages]
    jobs = make_jobs("llama")
    go(engines.other, engines.local, "llama", "server", 0)
    engines.other.finish_step(0)
    tops = engines.other.forward([without_labels(job) for job in jobs], 1, 0)
    if when == "before an update":
        answers = engines.other.backward(tail_gradients(engines.local, jobs, tops))

    kill_one(engines.other, is_busy=when == "in a wave")
    if when != "before an update":
        answers = engines.other.backward(tail_gradients(engines.local, jobs, tops))
    assert engines.other.finish_step(1)

    go(engines.local, engines.local, "llama", "server", 0)
    engines.local.finish_step(0)
    tops = engines.local.forward([without_labels(job) for job in jobs], 1, 0)
    assert_equal_answers(answers, engines.local.backward(tail_gradients(engines.local, jobs, tops)))
    engines.local.finish_step(1)
    assert_equal_states(engines.other, engines.local)


def kill_one(engine: RayEngine, *, is_busy: bool) -> None:
    """Kill the process of the last actor as the kernel would, while it computes or waits."""
    import ray

    actor = engine._chains._actors[-1]
    epoch = engine._chains._epoch
    pid = ray.get(actor.do.remote(epoch, "pid"))
    if is_busy:  # it dies with calls before it
        actor.do.remote(epoch, "evaluate_whole", None)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_other_families_in_two_rows_of_two(folder: Path, family: str) -> None:
    """A classifier whose head is trained and a model that ties it are cut as well."""
    with both(folder, family, (2, 2)) as engines:
        for step in range(2):
            answers = [
                go(e, engines.local, family, "server", step) for e in (engines.other, engines.local)
            ]
            assert_equal_answers(*answers)
            for engine in (engines.other, engines.local):
                assert engine.finish_step(step)
            if step == 0:
                head = {n: 0.5 * value for n, value in engines.local.learned().head.items()}
                assert bool(head) == (family == "bert")
                for engine in (engines.other, engines.local):
                    engine.take({}, {}, head)
        assert_equal_states(engines.other, engines.local)
        for job in make_jobs(family):
            loss, expected = engines.other.evaluate(job), engines.local.evaluate(job)
            assert loss == pytest.approx(expected, rel=RELATIVE)


def test_a_cluster_with_too_little_is_refused_in_one_line() -> None:
    """Who asks for more actors than there is room for reads what they need and what there is."""
    config = EngineConfig(kind="ray", stages=40, replicas=50, cpus_per_actor=2.0)

    with pytest.raises(ConfigError) as caught:
        RayCluster(config, "cpu")

    text = str(caught.value)
    assert text.startswith("engine: 2000 actors (40 stages x 50 replicas) of 2 CPUs each; ")
    assert "room for" in text
    assert "\n" not in text


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_run_whose_actor_is_killed_in_mid_wave_is_the_run_of_one_process(
    tmp_path: Path, labels: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Real devices notice nothing, each step counts once, and the same is learned."""
    expected, _ = run_devices(tmp_path / "local", labels, EngineConfig())
    config = EngineConfig(kind="ray", replicas=2, stages=2, cpus_per_actor=0.1)

    found, made = run_devices(tmp_path / "ray", labels, config)

    assert isinstance(made[-1], RayEngine)
    assert caplog.text.count("engine.lost") == 1
    assert found.reports == expected.reports
    assert len(set(found.reports)) == len(found.reports) == 3 * 6
    assert found.rows == expected.rows
    assert found.events == expected.events
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.learned.keys() == expected.learned.keys()
    for name, factors in expected.learned.items():
        assert error(found.learned[name].dense(), factors.dense()) <= 1e-4, name


class Ran(NamedTuple):
    """What a run has come to."""

    reports: list[tuple[str, int, int]]
    """Device, step and tokens of each report of a step."""
    rows: list[tuple[Any, ...]]
    """What is counted in each row of metrics."""
    losses: list[float]
    events: list[str]
    learned: Mapping[str, Factors]


def run_devices(folder: Path, labels: str, engine: EngineConfig) -> tuple[Ran, list[Engine]]:
    """Run three devices; where actors compute, one is killed in the middle of the fourth wave."""
    folder.mkdir()
    model = save_model("llama", folder / "model")
    cluster = Cluster(folder, model, folder / "parts")
    config = cluster.config(engine=engine, labels=labels)
    made, trap, reports = list[Engine](), Trap(), list[tuple[str, int, int]]()

    def keep(device: str, report: StepReport) -> None:
        reports.append((device, report.stamp.step, report.num_tokens))

    trap.on_step = keep
    with engines_of(config) as make:

        def make_engine(spec: EngineSpec) -> Engine:
            made.append(make(spec))
            if isinstance(made[-1], RayEngine):
                die_in_mid_wave(made[-1], "train" if labels == "server" else "backward", 4)
            return made[-1]

        try:
            serving = cluster.serve(config, trap=trap, make_engine=make_engine).start()
            clients = cluster.start()
            assert serving.wait(4 * PATIENCE_S) == "completed"
            wait_all(clients)
        finally:
            cluster.close()
    counted = ("round", "step", "samples")
    rows = [tuple(row.get(name) for name in counted) for row in serving.rows]
    losses = [row["train_loss"] for row in serving.rows if "train_loss" in row]
    events = sorted(row["event"] for row in serving.events)
    return Ran(sorted(reports), rows, losses, events, serving.ledger.totals), made


def die_in_mid_wave(engine: RayEngine, name: str, number: int) -> None:
    """Let the last actor be killed when the chains have begun with call *number* of *name*.

    It is stopped before, so that it surely has not finished then what it was given.
    """
    import ray

    chains, calls = engine._chains, count(1)
    cluster, begin, wait = chains._cluster, getattr(chains, name), chains._cluster.results
    stopped: list[int] = []

    def begun(*args: Any) -> Any:
        if next(calls) == number:
            pid = ray.get(chains._actors[-1].do.remote(chains._epoch, "pid"))
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        return begin(*args)

    def waited(references: Any) -> list[Any]:
        while stopped:
            os.kill(stopped.pop(), signal.SIGKILL)
        return wait(references)

    setattr(chains, name, begun)
    cluster.results = waited  # type: ignore[method-assign]

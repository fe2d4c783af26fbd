"""Every aggregation rule in a real run: learns, and leaves everybody with what the rule says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from coordinator.aggregation.rules import RULES, SERVER, Memory, Rule, exact
from coordinator.config.run import DeviceSettings, EvaluationConfig
from coordinator.engine.local import LocalEngine
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError
from edge_sdk.lora.factors import Factors, compress, stack
from edge_sdk.runtime.training import TrainingConfig
from tests.e2e.cluster import Cluster, Serving, sentences, wait_all, write_rows
from tests.tiny import BLOCKS

ADAM = TrainingConfig(learning_rate=2e-2, lr_scheduler_type="constant")
RANKS = {"a": 2, "b": 4, "c": 8}


def train(cluster: Cluster, rule: str, splits: tuple[int, ...], **settings: Any) -> Serving:
    """Serve a run of unequal devices to its end; the coordinator evaluates the global model."""
    equal = rule == "fedavg"
    devices = {
        n: DeviceSettings(split=k, r=4 if equal else RANKS[n])
        for n, k in zip("abc", splits, strict=True)
    }
    shard = write_rows(cluster.folder / "dev.jsonl", sentences(9, 8))
    settings = {
        "rounds": 3,
        "steps_per_round": 5,
        "server_rank": 4,
        "training": ADAM,
        "default": DeviceSettings(split=splits[-1], r=4, batch_size=4, codec="float32"),
        "evaluation": EvaluationConfig(data=DataConfig(path=str(shard))),
        **settings,
    }
    serving = cluster.serve(cluster.config(devices=devices, aggregation=rule, **settings)).start()
    clients = cluster.start(state=cluster.folder / f"state-{rule}")
    assert serving.wait() == "completed"
    wait_all(clients)
    return serving


@pytest.mark.parametrize("labels", ["server", "device"])
@pytest.mark.parametrize("rule", ["exact", "stack", "svd", "fedavg"])
def test_mixed_cuts_learn(cluster: Cluster, rule: str, labels: str) -> None:
    """Cut at 1, 3 and 5 of 5 blocks, the loss falls, and blocks held to be evaluated carry dW."""
    serving = train(cluster, rule, (1, 3, 5), labels=labels)

    losses = [row["eval"]["loss"] for row in serving.rows]
    assert losses[-1] < 0.97 * losses[0]
    engine = serving.coordinator.learned.engine
    assert isinstance(engine, LocalEngine)
    for weight, total in serving.ledger.totals.items():
        own = engine.trained.adapters.products().get(weight)
        held = [
            f.dense() for f in (own, engine.trained.adapters.residual.get(weight)) if f is not None
        ]
        expected = total.dense()
        if serving.ledger.pairs[SERVER].get(weight) is not None and rule == "svd":
            expected = own.dense() if own is not None else expected  # its best of rank 4
        size = max(1e-3, float(np.linalg.norm(expected)))
        assert np.linalg.norm(sum(held) - expected) <= 3e-5 * size, weight


@pytest.mark.parametrize("rule", ["fedex", "fedavg"])
def test_half_a_server_learning_rate_is_half_a_rate(cluster: Cluster, rule: str) -> None:
    """With one step of SGD a round both runs learn the same, of blocks that all devices hold."""
    sgd = TrainingConfig(
        optimizer="sgd", learning_rate=0.2, lr_scheduler_type="constant", max_grad_norm=0.0
    )
    common: dict[str, Any] = {"rounds": 4, "steps_per_round": 1, "max_rank": 64}
    slowed, slow = (
        train(cluster, rule, (BLOCKS,) * 3, name=name, **common, **settings).ledger.totals
        for name, settings in {
            "slowed": {"training": sgd, "server_learning_rate": 0.5},
            "slow": {"training": replace(sgd, learning_rate=0.1)},
        }.items()
    )

    assert slowed.keys() == slow.keys()
    assert max(np.abs(total.dense()).max() for total in slow.values()) > 1e-3
    for name, total in slow.items():
        np.testing.assert_allclose(slowed[name].dense(), total.dense(), atol=1e-6, err_msg=name)


def momentum(change: Factors, memory: Memory) -> tuple[Factors, Memory]:
    """Server momentum: add 0.9 of what was applied in the round before."""
    before = [Factors(memory["B"], memory["A"]).scaled(0.9)] if memory else []
    moved = compress(stack([change, *before]))[0]
    return moved, {"A": moved.a_RI, "B": moved.b_OR}


def test_a_rule_with_momentum_survives_a_stop(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One registration adds server momentum; stopped in a round and resumed, no bit differs."""
    monkeypatch.setitem(RULES, "momentum", Rule(exact, server_optimizer=momentum))
    config = cluster.config(aggregation="momentum", rounds=3, name="whole")
    whole = cluster.serve(config).start()
    wait_all(cluster.start(state=cluster.folder / "whole"))
    assert whole.wait() == "completed"
    stopped = cluster.serve(replace(config, name="run")).stop_at(7).start()
    clients = cluster.start()
    assert stopped.wait() == "paused"

    resumed = cluster.serve(replace(config, name="run")).start()

    assert resumed.wait() == "completed"
    wait_all(clients)
    assert resumed.metrics == whole.metrics
    expected, found = whole.ledger.state(), resumed.ledger.state()
    assert any(key.startswith("memory:") for key in expected)
    assert {n: v.tobytes() for n, v in found.items()} == {
        n: v.tobytes() for n, v in expected.items()
    }


@pytest.mark.parametrize("rule", ["zeropad", "svd"])
def test_federated_rules_learn(cluster: Cluster, rule: str) -> None:
    """With whole models on the devices and unequal ranks the loss falls."""
    losses = [row["eval"]["loss"] for row in train(cluster, rule, (BLOCKS,) * 3).rows]

    assert losses[-1] < 0.97 * losses[0]


def test_zeropad_with_a_cut_is_refused(cluster: Cluster) -> None:
    """Weights by norm cannot count each sample once: refused before the run, with the cure."""
    devices = {"a": DeviceSettings(split=1)}

    with pytest.raises(ConfigError, match=r"'zeropad' .* every device must hold all 5 blocks"):
        cluster.serve(cluster.config(aggregation="zeropad", devices=devices))


def test_hetlora_prunes_ranks(cluster: Cluster) -> None:
    """A heavy penalty makes tails fade: devices get smaller ranks, and the run goes on learning."""
    training = TrainingConfig(
        learning_rate=2e-2, lr_scheduler_type="constant", rank_penalty=3.0, rank_kept=0.5
    )

    serving = train(cluster, "zeropad", (BLOCKS,) * 3, training=training, rounds=4)

    ranks = {n: max(p.ranks.values()) for n, p in serving.admission.plans.items()}
    smallest = {n: min(p.ranks.values()) for n, p in serving.admission.plans.items()}
    assert max(ranks.values()) <= 8
    assert any(smallest[n] < RANKS[n] for n in "abc")
    held = {n: p.a_RI.shape[0] for n, p in serving.ledger.pairs["c"].items()}
    assert held.keys() == serving.admission.plans["c"].ranks.keys()
    losses = [row["eval"]["loss"] for row in serving.rows]
    assert losses[-1] < losses[0]


def test_pruning_needs_zeropad(cluster: Cluster) -> None:
    """Pruned ranks have no meaning elsewhere: refused before the run."""
    training = TrainingConfig(rank_penalty=0.1)

    with pytest.raises(ConfigError, match="rank_penalty"):
        cluster.serve(cluster.config(training=training))

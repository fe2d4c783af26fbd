"""Devices cut at different blocks learn, together, exactly what one machine would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from coordinator.config.run import DeviceSettings, ServeConfig
from edge_sdk.data.batches import Batches
from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.targets import find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.model.precision import autocast, resolve_compute
from edge_sdk.runtime.training import FIRST_LOSS_SCALE, TrainingConfig
from tests.e2e.cluster import Cluster, save_model, sentences, wait_all
from tests.tiny import VOCAB, make_config, make_model

SPLITS = {"a": (1, 2), "b": (2, 5), "c": (4, 3)}
"""Blocks and batch size of each device."""
CPU = torch.device("cpu")
SGD = TrainingConfig(
    optimizer="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0
)


def batches_of(name: str, size: int, model: Path) -> Batches:
    """What the device of that name trains on."""
    from transformers import AutoTokenizer

    rows = load_rows(sentences(ord(name)), DataConfig())
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = tokenize_rows(rows, tokenizer, DataConfig(), ModelLimits(vocab_size=VOCAB))
    return Batches(examples, size, size, seed=0, name=name, pad_id=1)


class Central:
    """Plain PEFT on the whole model."""

    def __init__(self, config: ServeConfig) -> None:
        task, self.compute = config.task, resolve_compute(config.compute, CPU)
        # A power of two, below which float16 loses small gradients; it changes nothing else.
        self.loss_scale = FIRST_LOSS_SCALE if self.compute == torch.float16 else 1.0
        tiny = make_config("llama")
        layout = find_layout(tiny, task)
        self.targets = find_targets(tiny, task, layout, config.lora)
        self.scale = config.lora.lora_alpha / config.lora.r
        settings = peft.LoraConfig(
            target_modules=list(self.targets), r=config.lora.r, lora_alpha=config.lora.lora_alpha
        )
        model = make_model(tiny, task)
        self.model: Any = peft.inject_adapter_in_model(settings, model).train()
        parameters = dict(self.model.named_parameters())
        self.factors: dict[str, torch.Tensor] = {}
        for name, shape in self.targets.items():
            pair = initial_pair(name, config.lora.r, shape, seed=0)
            for letter, value in (("A", pair.a_RI), ("B", pair.b_OR)):
                parameter = parameters[f"{name}.lora_{letter}.default.weight"]
                parameter.data.copy_(torch.from_numpy(value))
                self.factors[f"{name}.{letter}"] = parameter
        self.optimizer = torch.optim.SGD(self.factors.values(), lr=SGD.learning_rate)

    def step(self, step: int, streams: dict[str, Batches]) -> None:
        """One step on the pooled batches: the mean of the devices' losses, by samples."""
        samples = sum(stream.batch_size for stream in streams.values())
        for stream in streams.values():
            (micro,) = stream.at(step).micro_batches
            ids_BT = torch.from_numpy(micro.input_ids)
            mask_BT = torch.arange(ids_BT.shape[1])[None] < torch.from_numpy(micro.lengths)[:, None]
            labels_BT = torch.from_numpy(micro.labels)
            with autocast(self.compute, CPU):
                loss = self.model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
            (loss * stream.batch_size / samples * self.loss_scale).backward()
        for factor in self.factors.values():
            factor.grad = None if factor.grad is None else factor.grad / self.loss_scale
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load(self, pairs: Mapping[str, Pair]) -> None:
        """Go on from other factors."""
        for name, pair in pairs.items():
            for letter, value in zip("AB", pair, strict=True):
                self.factors[f"{name}.{letter}"].data.copy_(torch.from_numpy(value))

    def factor(self, name: str) -> np.ndarray:
        """One trained factor."""
        return self.factors[name].detach().numpy()


@pytest.fixture
def experts(tmp_path: Path, parts: Path) -> Iterator[Cluster]:
    """The same around a mixture of experts."""
    made = Cluster(tmp_path, save_model("mixtral", tmp_path / "model"), parts)
    yield made
    made.close()


@pytest.mark.parametrize("labels", ["server", "device"])
def test_three_cuts_are_one_machine(cluster: Cluster, labels: str) -> None:
    """Devices at 1, 2 and 4 of 5 blocks, I = 1, SGD, fedavg: 20 steps equal centralised LoRA."""
    devices = {n: DeviceSettings(split=k, batch_size=b) for n, (k, b) in SPLITS.items()}
    config = cluster.config(
        labels=labels,
        rounds=20,
        steps_per_round=1,
        aggregation="fedavg",
        training=SGD,
        devices=devices,
    )
    central = Central(config)  # alone: all threads draw from one source of random numbers
    serving = cluster.serve(config).start()
    clients = cluster.start()
    streams = {n: batches_of(n, size, cluster.model) for n, (_, size) in SPLITS.items()}
    start = {name: central.factor(name).copy() for name in central.factors}

    for step in range(20):
        central.step(step, streams)
    outcome = serving.wait()
    wait_all(clients)

    assert outcome == "completed"
    ledger = serving.ledger
    joined = {weight: pair for own in ledger.pairs.values() for weight, pair in own.items()}
    assert joined.keys() == ledger.totals.keys() == central.targets.keys()
    moved = {"A": 0.0, "B": 0.0}
    for name, pair in joined.items():
        for letter, found in (("A", pair.a_RI), ("B", pair.b_OR)):
            expected = central.factor(f"{name}.{letter}")
            np.testing.assert_allclose(found, expected, atol=1e-5)
            moved[letter] = max(moved[letter], np.abs(expected - start[f"{name}.{letter}"]).max())
    assert min(moved.values()) > 1e-2


@pytest.mark.parametrize("kind", ["cluster", "experts"])
def test_exact_adds_everybodys_progress(kind: str, request: pytest.FixtureRequest) -> None:
    """With mixed ranks and cuts, one round's dW is the dense mean of all progress by samples."""
    cluster: Cluster = request.getfixturevalue(kind)
    devices = {
        "a": DeviceSettings(split=1, batch_size=2, r=2),
        "b": DeviceSettings(split=2, batch_size=5, r=4),
        "c": DeviceSettings(split=4, batch_size=3, r=8),
    }
    config = cluster.config(
        rounds=1, steps_per_round=4, server_rank=6, training=SGD, devices=devices
    )
    serving = cluster.serve(config)
    ledger = serving.ledger
    kept: dict[str, Any] = {}
    aggregate = ledger.aggregate

    def spy(reports: Any) -> Any:
        kept["before"] = {name: dict(ledger.pairs[name]) for name in reports}
        kept["after"] = {name: dict(report.pairs) for name, report in reports.items()}
        return aggregate(reports)

    ledger.aggregate = spy  # type: ignore[method-assign]
    serving.start()
    clients = cluster.start()
    assert serving.wait() == "completed"
    wait_all(clients)

    learned = ledger.global_factors()
    moved = 0.0
    sizes = {n: s.batch_size or 0 for n, s in devices.items()}
    splits = {n: s.split or 0 for n, s in devices.items()}
    assert learned.keys() == serving.model.facts.targets.keys()
    for weight, shape in serving.model.facts.targets.items():
        block = serving.model.facts.block_of(weight)
        here = {n: s for n, s in sizes.items() if splits[n] > block}
        shares = here | {"": sum(s for n, s in sizes.items() if splits[n] <= block)}
        expected = np.zeros(shape)
        for name, size in shares.items():
            if not size:
                continue
            after, before = kept["after"][name][weight], kept["before"][name][weight]
            scale = config.lora.scale(name, after.a_RI.shape[-2])
            change = after.b_OR @ after.a_RI - before.b_OR @ before.a_RI
            expected += size / sum(sizes.values()) * scale * change.astype(np.float64)
        moved = max(moved, np.abs(expected).max())
        np.testing.assert_allclose(learned[weight].dense(), expected, atol=1e-5)
    assert moved > 1e-2

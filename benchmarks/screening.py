"""Whom screening leaves out: honest devices of fleets that scatter, and devices that are not.

    python benchmarks/screening.py [--seeds 2] [--rounds 4]

Ten devices train a model with LoRA from the same start, as PEFT does, each on texts of its own; a
round ends with the mean of all. How far each has moved each weight is measured as the coordinator
measures it. Fleets of 3 to 10 of these devices are then looked at, in each round, with the weights
of all blocks and of the first alone: with all devices honest, and with each of them as an attacker
that makes all of its update larger, or one weight of it that is drawn. The model is the random
Llama of the tests with sentences of its letters; shards have words and lengths of their own or not.
`before` is the rule by which one weight that is ten times as far as the others' median was enough.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from report import header, save, table
from torch import nn

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.screening import Moves, Screening
from edge_sdk.lora.adapters import Pair, initial_pair
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import find_layout
from edge_sdk.runtime.training import TrainingConfig

DEVICES = 10
FLEETS = (3, 4, 6, 10)
ROWS, STEPS = (1, 3, 16), (1, 5)
WHOLE, SINGLE = (10, 15, 30, 100), (10, 30, 100)
"""How many times as large an attacker makes its update, or one weight of it."""
FACTOR = 10.0
LORA = LoraConfig(r=4, lora_alpha=8)
WORDS = ("red", "green", "small", "old", "boat", "house", "river", "bird", "sees", "likes", "near")


class Setting(NamedTuple):
    """What a fleet's rounds are like."""

    optimizer: str
    rows: int
    steps: int
    is_iid: bool


def training_of(setting: Setting) -> TrainingConfig:
    """The optimizer: plain SGD, which nothing clips, or AdamW."""
    if setting.optimizer == "adamw":
        return TrainingConfig(learning_rate=1e-2, lr_scheduler_type="constant")
    return TrainingConfig(
        optimizer="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0
    )


# ---- honest training -----------------------------------------------------------------------------


def tiny(seed: int, *, is_iid: bool) -> tuple[nn.Module, Any, list[list[list[int]]]]:
    """The random Llama of the tests, and sentences; the shards have words of their own or not."""
    from tests.tiny import make_config, make_model

    letters = {letter: number + 4 for number, letter in enumerate(" abcdefghijklmnopqrstuvwxyz")}
    shards = []
    for device in range(DEVICES):
        draw = np.random.default_rng([seed, device])
        words = WORDS if is_iid else draw.choice(WORDS, 3, replace=False)
        longest = 6 if is_iid else int(draw.integers(2, 9))
        texts = [" ".join(draw.choice(words, draw.integers(2, longest + 1))) for _ in range(24)]
        shards.append([[0, *(letters[letter] for letter in text)] for text in texts])
    config = make_config("llama")
    return make_model(config, "causal-lm", seed), config, shards


class Fleet:
    """Ten devices that train the same adapters in turn, and what they hold in common."""

    def __init__(self, setting: Setting, seed: int, num_rounds: int) -> None:
        self.setting, self.config = setting, training_of(setting)
        model, config, self.shards = tiny(seed, is_iid=setting.is_iid)
        shapes = find_targets(config, "causal-lm", find_layout(config, "causal-lm"), LORA)
        settings = peft.LoraConfig(
            target_modules=list(shapes), r=LORA.r, lora_alpha=int(LORA.lora_alpha)
        )
        self.model: Any = peft.inject_adapter_in_model(settings, model).train()
        named = dict(self.model.named_parameters())
        self.pairs = {name: initial_pair(name, LORA.r, s, seed=0) for name, s in shapes.items()}
        self.factors = {
            name: tuple(named[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
            for name in shapes
        }
        self.optimizers = [self._optimizer() for _ in range(DEVICES)]
        self.draws = [np.random.default_rng([seed, n, 1]) for n in range(DEVICES)]
        total = num_rounds * setting.steps
        self.screening = Screening(
            self.config, setting.steps, total, "float32", LORA.scale, factor=FACTOR
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [factor for pair in self.factors.values() for factor in pair]
        if self.setting.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.config.learning_rate)
        return torch.optim.AdamW(parameters, lr=self.config.learning_rate, weight_decay=0.0)

    def round(self, number: int) -> np.ndarray:
        """Train a round on all devices; returns (devices, weights), how far each has moved."""
        ends = [self._trained(device) for device in range(DEVICES)]
        moved = []
        for pairs in ends:
            report = Report(self.setting.steps, self.setting.rows, pairs)
            brought = self.screening.brought(report, number, self.pairs, {})
            moved.append(list(self.screening.moves(brought).values()))
        self.pairs = {
            name: Pair(*(np.mean([end[name][f] for end in ends], axis=0) for f in range(2)))
            for name in self.pairs
        }
        return np.array(moved)

    def _trained(self, device: int) -> dict[str, Pair]:
        for name, factors in self.factors.items():
            for factor, value in zip(factors, self.pairs[name], strict=True):
                factor.data.copy_(torch.from_numpy(value))
        optimizer, shard = self.optimizers[device], self.shards[device]
        for _ in range(self.setting.steps):
            chosen = self.draws[device].choice(
                len(shard), min(len(shard), self.setting.rows), False
            )
            self._loss([shard[n] for n in chosen]).backward()
            if self.config.max_grad_norm:
                parameters = [factor for pair in self.factors.values() for factor in pair]
                nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return {
            name: Pair(*(factor.detach().numpy().copy() for factor in factors))
            for name, factors in self.factors.items()
        }

    def _loss(self, rows: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        labels = ids.masked_fill(mask == 0, -100)
        loss: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss


# ---- who is left out -----------------------------------------------------------------------------


def before(device: str, moves: Mapping[str, Moves], likely: float) -> bool:
    """Whether one weight alone was enough."""
    for weight, own in moves[device].items():
        usual = median(m[weight] for name, m in moves.items() if name != device)
        if own > max(FACTOR * usual, likely):
            return True
    return False


def uploads(own: Moves, draw: np.random.Generator) -> Iterator[Moves]:
    """What a device brings: honestly, and with each attack."""
    yield own
    for times in WHOLE:
        yield {weight: times * moved for weight, moved in own.items()}
    for times in SINGLE:
        chosen = str(draw.choice(list(own)))
        yield {weight: moved * (times if weight == chosen else 1) for weight, moved in own.items()}


def judged(fleet: Fleet, moved_DW: np.ndarray, draw: np.random.Generator) -> Iterator[list[bool]]:
    """Whether each upload of each device of a fleet is left out, by the rule before and by ours."""
    likely = 1.5 if fleet.setting.optimizer == "adamw" else 0.0
    honest = {
        f"d{n}": {name: float(x) for name, x in zip(fleet.pairs, row, strict=False)}
        for n, row in enumerate(moved_DW)
    }
    for device, own in honest.items():
        found = []
        for upload in uploads(own, draw):
            moves = {**honest, device: upload}
            found += [before(device, moves, likely), bool(fleet.screening.unlike(device, moves))]
        yield found


def measure(options: argparse.Namespace) -> dict[tuple[object, ...], list[list[bool]]]:
    """Train all fleets, and judge what they bring; by optimizer, devices and size of a round."""
    results = defaultdict(list)
    kinds = product(("sgd", "adamw"), ROWS, STEPS, (True, False), range(options.seeds))
    for optimizer, rows, steps, is_iid, seed in kinds:
        fleet = Fleet(Setting(optimizer, rows, steps, is_iid), seed, options.rounds)
        draw = np.random.default_rng([seed, 2])
        for number in range(options.rounds):
            moved_DW = fleet.round(number)
            for size, weights in product(FLEETS, (7, moved_DW.shape[1])):
                chosen = draw.choice(DEVICES, size, replace=False)
                found = judged(fleet, moved_DW[chosen, :weights], draw)
                results[optimizer, size, rows * steps].extend(found)
    return results


def main() -> None:
    """Train, judge, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []
    for (optimizer, size, samples), found in measure(options).items():
        old, new = np.array(found)[:, 0::2], np.array(found)[:, 1::2]
        shares = [
            f"{100 * a:.0f} / {100 * b:.0f}" for a, b in zip(old.mean(0), new.mean(0), strict=True)
        ]
        honest = f"{old[:, 0].sum()} / {new[:, 0].sum()}"
        rows.append([optimizer, size, samples, len(found), honest, *shares[1:]])
    heads = ["optimizer", "devices", "rows a round", "honest uploads", "left out"]
    heads += [f"x {n}, %" for n in WHOLE] + [f"one weight x {n}, %" for n in SINGLE]
    title = header("Whom screening leaves out: before / now", options)
    save("screening", f"{title}\n\n{table(heads, rows)}")


if __name__ == "__main__":
    main()

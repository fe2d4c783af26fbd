"""What runs have learned, without a run: tiny models with changes drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from coordinator.export.check import load_base
from coordinator.export.facts import CurvePoint, RunFacts
from edge_sdk.lora.factors import Factors
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.weights import ModelSource
from tests.tiny import CLASSES, VOCAB, make_config, make_model, task_of

TOLERANCE = 1e-5
NAMES = ("none", "some", "many", "all of it")


def facts_of(label_names: tuple[str, ...] = (), rounds: int = 3) -> RunFacts:
    """A run of two devices."""
    curve = [CurvePoint(n, None if n == 0 else 2.0 / n, 1.0 / (n + 1)) for n in range(rounds + 1)]
    return RunFacts(
        label_names=label_names,
        method="preset splitlora",
        is_pooled=False,
        devices=2,
        rounds=rounds,
        steps=5 * rounds,
        learning_rate=1e-3,
        seed=0,
        curve=tuple(curve),
        versions={"edgesplit": "0"},
    )


class Result:
    """A tiny model on disk and what a run has learned about it."""

    def __init__(
        self, family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> None:
        model: Any = make_model(make_config(family, **changes), task_of(family)).to(dtype)
        model.save_pretrained(folder)
        task = task_of(family)
        num_labels = CLASSES if task == "sequence-classification" else 0
        self.source = ModelSource(str(folder), task, num_labels=num_labels)
        self.source.load_whole(0)
        generator = np.random.default_rng(0)
        targets = find_targets(self.source.config, task, self.source.layout, LoraConfig())
        self.learned: dict[str, Factors] = {}
        for index, (name, shape) in enumerate(targets.items()):
            rank = index % 4  # some weights have learned nothing
            sizes_a, sizes_b = shape.factors(rank)
            b_OR = generator.normal(0, 0.1, sizes_b).astype(np.float32)
            a_RI = generator.normal(0, 0.1, sizes_a).astype(np.float32)
            self.learned[name] = Factors(b_OR, a_RI)
        self.head = {}
        if num_labels:
            state = model.state_dict()
            names = ("classifier.weight", "classifier.bias")
            self.head = {n: state[n].float().numpy() + np.float32(0.3) for n in names}
        self.facts = facts_of(NAMES if num_labels else ())
        ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def base(self) -> Any:
        """The base as transformers loads it, in float32."""
        return load_base(self.source).eval()

    def expected(self) -> torch.Tensor:
        """Logits of base weights plus dense dW."""
        model = self.base()
        with torch.no_grad():
            for name, factors in self.learned.items():
                add(model, name, torch.from_numpy(factors.b_OR @ factors.a_RI))
            for name, value in self.head.items():
                model.get_parameter(name).copy_(torch.from_numpy(value))
        return self.logits(model)

    def logits(self, model: Any) -> torch.Tensor:
        """What *model* answers."""
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(**self.inputs).logits
        return logits

    def check(self, model: Any) -> None:
        """*model* computes the expected logits, which are not those of the base."""
        expected, found = self.expected(), self.logits(model)
        assert difference(found, expected) <= TOLERANCE
        assert difference(self.logits(self.base()), expected) > 100 * TOLERANCE


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def add(model: Any, name: str, change_OI: torch.Tensor) -> None:
    """Add to a weight, of a linear layer or of experts, whichever way round it is kept."""
    is_stacked = change_OI.dim() == 3
    weight = model.get_parameter(name if is_stacked else f"{name}.weight")
    turned = model.config.model_type == ("gpt_oss" if is_stacked else "gpt2")
    with torch.no_grad():
        weight += change_OI.mT if turned else change_OI

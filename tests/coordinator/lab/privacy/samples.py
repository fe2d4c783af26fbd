"""Tiny models with texts of random tokens, for attacks of which the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from coordinator.lab.privacy.texts import Texts
from edge_sdk.data.batches import pad
from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.tokenize import Example
from edge_sdk.model.layout import find_layout
from edge_sdk.model.partition import Slice
from tests.tiny import CLASSES, VOCAB, make_config, make_model, make_parts, task_of

# Tokens below it are special ones.
FIRST = 4
PROMPT = 5


def slice_of(family: str, seed: int = 0, **changes: Any) -> Slice:
    """A whole tiny model as a slice, with larger weights than at its start: blocks do something."""
    config, task = make_config(family, **changes), task_of(family)
    layout = find_layout(config, task)
    model = make_model(config, task, seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 4.0
    found = Slice(config, task, layout, torch.float32)
    for name, tensors in make_parts(model, layout, list(layout.part_names())).items():
        found.add(name, tensors)
    found.model.eval()
    return found


def random_texts(seed: int, count: int = 16, *, classes: bool = False) -> Texts:
    """Texts of 8 to 14 tokens, of which the first 5 are a prompt, or that have a class."""
    draw = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        ids = draw.integers(FIRST, VOCAB, draw.integers(8, 15)).astype(np.int32)
        ids[0] = 0
        labels: Any = ids.copy()
        labels[:PROMPT] = IGNORE
        if classes:
            labels = int(draw.integers(0, CLASSES))
        examples.append(Example(ids, labels, f"row:{number}"))
    halves = examples[: count // 2], examples[count // 2 :]
    return Texts(tuple(pad(half, 1) for half in halves), frozenset(range(FIRST)))

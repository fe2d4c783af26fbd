"""The sets on which benchmarks/rank_choice.py compares choices of ranks: data, model, measures."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from methods_experiments import intents, model_path
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

NUM_TRAIN, NUM_DEV, NO_TARGET = 2000, 500, -100
Row = tuple[list[int], Any]


@dataclass(frozen=True)
class RankSet:
    """One data set with one model."""

    data: str
    """A part of the file names, or `orders`, which are generated."""
    model: str
    max_length: int
    first_rate: float
    """Learning rate at which the search begins."""

    @property
    def is_classifier(self) -> bool:
        """Whether texts have classes."""
        return self.data == "banking"

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return intents() if self.is_classifier else []

    def make_model(self) -> Any:
        """The model as published; a new head is drawn from one seed for all."""
        torch.manual_seed(0)
        kind = AutoModelForSequenceClassification if self.is_classifier else AutoModelForCausalLM
        own = {"num_labels": len(self.classes)} if self.is_classifier else {}
        return kind.from_pretrained(model_path(self.model), dtype=torch.float32, **own)

    def rows(self, data: Path) -> tuple[list[Row], list[Row]]:
        """Tokens and targets for training, and of the rows held out."""
        tokenizer = AutoTokenizer.from_pretrained(model_path(self.model))
        train, dev = orders() if self.data == "orders" else self._read(data)
        return [self._encode(tokenizer, row) for row in train], [
            self._encode(tokenizer, row) for row in dev[:NUM_DEV]
        ]

    def _read(self, data: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        files = [data / f"{self.data}-{part}.jsonl" for part in ("train", "dev")]
        train, dev = ([json.loads(line) for line in file.open(encoding="utf-8")] for file in files)
        return train, dev

    def _encode(self, tokenizer: Any, row: dict[str, str]) -> Row:
        if self.is_classifier:
            ids = tokenizer(row["text"], truncation=True, max_length=self.max_length)["input_ids"]
            return ids, self.classes.index(row["label"])
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        targets = [NO_TARGET] * len(prompt) + answer
        return (prompt + answer)[: self.max_length], targets[: self.max_length]

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """What the model takes."""
        longest = max(len(ids) for ids, _ in rows)

        def filled(lists: Sequence[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([own + [value] * (longest - len(own)) for own in lists])

        ids = [ids for ids, _ in rows]
        targets = [target for _, target in rows]
        return {
            "input_ids": filled(ids, 0),
            "attention_mask": filled([[1] * len(own) for own in ids], 0),
            "labels": torch.tensor(targets) if self.is_classifier else filled(targets, NO_TARGET),
        }

    @torch.no_grad()
    def evaluate(self, model: Any, rows: Sequence[Row]) -> tuple[float, float]:
        """Mean loss of a target, and the part of targets that are found."""
        model.eval()
        total = count = found = 0.0
        for start in range(0, len(rows), 50):
            batch = self.batch(rows[start : start + 50])
            out, labels = model(**batch), batch["labels"]
            logits = out.logits if self.is_classifier else out.logits[:, :-1]
            labels = labels if self.is_classifier else labels[:, 1:]
            counts = labels != NO_TARGET
            total += float(out.loss) * int(counts.sum())
            found += int(((logits.argmax(-1) == labels) & counts).sum())
            count += int(counts.sum())
        model.train()
        return total / count, found / count


RANK_SETS = {
    "e2e-stories": RankSet("e2e", "stories", 128, 5e-3),
    "e2e-base": RankSet("e2e", "base", 128, 1e-2),
    "banking": RankSet("banking", "minilm", 32, 2e-3),
    "orders-base": RankSet("orders", "base", 96, 1e-2),
}


def orders() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Orders of goods and the sentences that say them, from a grammar of ours."""
    draw = random.Random(5)
    names = ["Ann", "Bob", "Cem", "Dora", "Emil", "Fay", "Gil", "Hana", "Ivo", "Jun"]
    goods = ["bolts", "lamps", "tiles", "ropes", "jars", "fans", "keys", "belts"]
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
    rows = []
    for _ in range(NUM_TRAIN + NUM_DEV):
        who, count, what, day = (
            draw.choice(names),
            draw.randint(2, 99),
            draw.choice(goods),
            draw.choice(days),
        )
        rush = draw.random() < 0.3
        end = ", and it is urgent." if rush else "."
        said = (f" {who} wants {count} {what} by {day}", f" Send {count} {what} to {who} on {day}")
        rows.append(
            {
                "prompt": f"who[{who}] count[{count}] item[{what}] day[{day}] rush[{rush}]",
                "completion": draw.choice(said) + end,
            }
        )
    return rows[:NUM_TRAIN], rows[NUM_TRAIN:]

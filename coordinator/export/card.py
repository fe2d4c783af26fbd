"""The README.md of an export: what it is, how it is loaded, and how it came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from coordinator.config.scoring import SCORES
from coordinator.export.facts import RunFacts
from coordinator.export.options import Format
from edge_sdk.model.layout import auto_class
from edge_sdk.model.weights import ModelSource

# Most rows of the table of losses; more of them are thinned out.
MOST_ROWS = 20


class BaseName(NamedTuple):
    """How others find the model that was trained."""

    name: str
    """Its id on the hub, or the name of its folder, without where that lies."""
    revision: str | None
    """Commit of the hub's repository."""


def base_name(source: ModelSource) -> BaseName:
    """Return how others find the base of *source*; never a path, which leads nowhere for them."""
    if source.hub_id is not None:
        return BaseName(source.hub_id, source.revision)
    return BaseName(source.folder.resolve().name, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the README.md of an export is made of."""

    source: ModelSource
    format: Format
    ranks: Mapping[str, int]
    """Rank of each adapted weight, as written."""
    facts: RunFacts | None = None
    """How it came about; None where no run is known."""
    dtype: str = "float32"
    """Dtype of the weights, as written."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of a classifier's classes; a number for each where they have none."""
        named = () if self.facts is None else self.facts.label_names
        is_classifier = self.source.task == "sequence-classification"
        return named or tuple(str(n) for n in range(is_classifier * self.source.config.num_labels))

    def text(self) -> str:
        """Return the README.md."""
        parts = [_head(self), _title(self), _loading(self), _training(self), LICENCE]
        return "\n".join(part for part in parts if part)


def _head(card: Card) -> str:
    base = base_name(card.source)
    library = "transformers" if card.format == "merged" else "peft"
    kind = "text-generation" if card.source.task == "causal-lm" else "text-classification"
    found = [f"base_model: {json.dumps(base.name)}"] if card.source.hub_id else []
    tags = "tags: [edgesplit]" if card.format == "merged" else "tags: [lora, edgesplit]"
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {kind}", *found, tags, "---", ""]
    return "\n".join(lines)


def _title(card: Card) -> str:
    base = base_name(card.source)
    at = f" at commit `{base.revision}`" if base.revision else ""
    local = "" if card.source.hub_id else " (a local folder; where it lies is not said here)"
    what = "Model" if card.format == "merged" else "LoRA adapter"
    about = f"Base model: `{base.name}`{at}{local}. Task: {card.source.task}."
    lines = [f"# {what} trained with EdgeSplit", "", about]
    if card.format == "merged":
        lines.append(f"The adapters are merged into the weights, which are {card.dtype}.")
    else:
        ranks = sorted(set(card.ranks.values()))
        config = json.dumps({"weights": len(card.ranks), "ranks": ranks})
        lines.append(f"Adapted: `{config}`.")
    if card.label_names:
        lines.append(f"Classes: {', '.join(f'`{name}`' for name in card.label_names)}.")
    return "\n".join([*lines, ""])


def _loading(card: Card) -> str:
    how = {"peft": _peft, "vllm": _vllm, "gguf": _gguf, "merged": _merged}[card.format]
    return "\n".join(["## Use", "", how(card), ""])


def _peft(card: Card) -> str:
    base = base_name(card.source)
    factory = _factory(card)
    at = f", revision={base.revision!r}" if base.revision else ""
    where = "" if card.source.hub_id else "  # the path of that folder"
    lines = [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {factory}, AutoTokenizer",
        "",
        f"base = {base.name!r}{where}",
        'adapter = "."  # this folder',
        *_class_lines(card),
        f"model = {factory}.from_pretrained(base{at}{_class_arguments(card)})",
        "model = PeftModel.from_pretrained(model, adapter).eval()",
        f"tokenizer = AutoTokenizer.from_pretrained(base{at})",
        *_use(card),
        "```",
    ]
    return "\n".join(lines)


def _merged(card: Card) -> str:
    factory = _factory(card)
    lines = [
        "```python",
        f"from transformers import {factory}, AutoTokenizer",
        "",
        'folder = "."  # this folder',
        f'model = {factory}.from_pretrained(folder, dtype="auto").eval()',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *_use(card),
        "```",
    ]
    if card.source.task == "causal-lm":
        lines += ["", "Ollama: `ollama create my-model -f Modelfile`."]
    return "\n".join(lines)


def _vllm(card: Card) -> str:
    base, rank = base_name(card.source), max(card.ranks.values())
    revision = f" --revision {base.revision}" if base.revision else ""
    return (
        f"All weights have rank {rank} and the scale 1, as readers need that know one of each.\n\n"
        "```sh\n"
        f"vllm serve {base.name}{revision} --enable-lora --max-lora-rank {rank} "
        "--lora-modules tuned=.\n"
        "```\n\n"
        f"PEFT reads it, too:\n\n{_peft(card)}"
    )


def _gguf(_card: Card) -> str:
    return (
        "`base.gguf` is the base model as llama.cpp's convert_hf_to_gguf.py makes it.\n\n"
        "```sh\n"
        "llama-cli -m base.gguf --lora adapter.gguf\n"
        "ollama create my-model -f Modelfile\n"
        "```"
    )


def _factory(card: Card) -> str:
    name: str = auto_class(card.source.config, card.source.task).__name__
    return name


def _class_lines(card: Card) -> list[str]:
    return [f"names = {list(card.label_names)!r}"] if card.label_names else []


def _class_arguments(card: Card) -> str:
    if not card.label_names:
        return ""
    return (
        ",\n    id2label=dict(enumerate(names)),"
        "\n    label2id={name: n for n, name in enumerate(names)},"
        f"\n    pad_token_id={card.source.config.get_text_config().pad_token_id},\n"
    )


def _use(card: Card) -> list[str]:
    lines = ['inputs = tokenizer("A text", return_tensors="pt")']
    if card.source.task == "causal-lm":
        return [*lines, "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"]
    return [*lines, "print(model.config.id2label[int(model(**inputs).logits.argmax())])"]


def _training(card: Card) -> str:
    facts = card.facts
    if facts is None:
        return ""
    if facts.is_pooled:
        where = "Trained on pooled data."
    else:
        where = (
            "Trained across devices that kept their data; this is the sum of what all of them\n"
            "learned."
        )
    rows = {
        "method": facts.method,
        "devices": facts.devices,
        "rounds": facts.rounds,
        "optimizer steps": facts.steps,
        **({"model of round": f"{facts.result_round}, best {facts.best}"} if facts.best else {}),
        **{
            name.replace("_", " "): f"{facts.test[name]:.4f}"
            for name in ("test_loss", "test_perplexity", "test_accuracy")
            if facts.test.get(name) is not None
        },
        **{
            f"test {kind.title}": kind.text(facts.test[f"test_{name}"])
            for name, kind in SCORES.items()
            if f"test_{name}" in facts.test
        },
        "learning rate": facts.learning_rate,
        "seed": facts.seed,
        **facts.versions,
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    curve = ["| rounds done | training loss | evaluation loss |", "|---|---|---|"]
    for point in _thinned(facts.curve):
        curve.append(f"| {point[0]} | {_number(point[1])} | {_number(point[2])} |")
    return "\n".join(["## Training", "", where, "", *table, "", *curve, ""])


def _thinned(
    rows: tuple[tuple[int, float | None, float | None], ...],
) -> list[tuple[int, float | None, float | None]]:
    """Return at most `MOST_ROWS` of *rows*, evenly, the first and the last among them."""
    last, most = len(rows) - 1, MOST_ROWS - 1
    if last <= most:
        return list(rows)
    return [rows[round(n * last / most)] for n in range(most + 1)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


LICENCE = """\
## Licence

Left to whoever publishes this; the licence of the base model applies to what is made of it. The hub
reads it from a line `license:` in the head of this file.
"""

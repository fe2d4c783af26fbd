"""Small tokenizers of every kind, templates in the manner of every family, and chats for both.

python -m tests.edge_sdk.data.template_cases     write the table of them in docs/data.md
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.fast_tokenizer import PlainTokenizer
from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.data.tokenize import Example, ModelLimits, tokenize_rows
from edge_sdk.errors import DataError

TEMPLATES = Path(__file__).parents[2] / "data" / "templates"
PAGE = Path(__file__).parents[3] / "docs" / "data.md"
BEGIN = "<!-- Templates: written by tests/edge_sdk/data/template_cases.py. -->"
END = "<!-- End of templates. -->"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
SPECIAL = ["<s>", "</s>", "<unk>"]
ADDED = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "[INST]", "[/INST]"]
ADDED += ["<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<think>", "</think>"]
WORDS = [
    "The boat leaves at noon, and the ferry at two.",
    "### user:\nWhere is the old house?\n\n### assistant:\nBehind the hill.\n\n",
    '{"name": "time", "arguments": {"city": "Oslo"}}  a  b\n\n<tools> tool_call You may call',
    "system user assistant model tool ipython parameters AVAILABLE_TOOLS TOOL_CALLS",
]
LIMITS = ModelLimits(vocab_size=4096, max_positions=2048)
BLANK = "\u2581"


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """As Llama 2 has it: a blank before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    """As Mistral's newer ones: a blank before the first text only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _unigram() -> Tokenizer:
    """As Gemma has it: blanks are letters, and none is added."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", BLANK)
    tokenizer.decoder = decoders.Replace(BLANK, " ")
    return tokenizer


TOKENIZERS = {
    "byte-level": _byte_level,
    "sentencepiece": _sentencepiece,
    "metaspace": _metaspace,
    "no prefix": _unigram,
}


@cache
def tokenizer_folder(kind: str) -> Path:
    """Return a folder with a tokenizer of that *kind*, which begins a text with `<s>`."""
    folder = Path(tempfile.mkdtemp(prefix="edgesplit-tokenizer-"))
    tokenizer = TOKENIZERS[kind]()
    alphabet = sorted({BLANK, "\n", *map(chr, range(32, 127)), *"\u00e9\u4f60"})
    if kind == "byte-level":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens(ADDED)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@cache
def both_tokenizers(kind: str) -> tuple[Any, Any]:
    """Return the tokenizer of transformers, and that of a device without it."""
    folder = tokenizer_folder(kind)
    return AutoTokenizer.from_pretrained(folder), PlainTokenizer(folder)


def with_template(kind: str, template: str) -> tuple[Any, Any]:
    """Return both tokenizers of that *kind* with a template of tests/data/templates."""
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    found = both_tokenizers(kind)
    for tokenizer in found:
        tokenizer.chat_template = text
    return found


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    """Return a turn of a chat."""
    return {"role": role, "content": content, **more}


CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "time", "arguments": '{"city": "Oslo"}'},
}
TOOLS = [
    {"type": "function", "function": {"name": "time", "description": "The time in a city."}},
]
QUESTION, ANSWER = turn("user", "Where is the boat?"), turn("assistant", "It leaves at noon.")
MORE = [turn("user", "And the ferry?"), turn("assistant", "At two.")]
CHATS: dict[str, dict[str, Any]] = {
    "one answer": {"messages": [QUESTION, ANSWER]},
    "two answers": {"messages": [QUESTION, ANSWER, *MORE]},
    "system": {"messages": [turn("system", "Be brief."), QUESTION, ANSWER]},
    "thoughts": {
        "messages": [
            QUESTION,
            turn("assistant", "<think>\nOld hill.\n</think>\n\nBehind it."),
            *MORE[:1],
            turn("assistant", "<think>\nA clock.\n</think>\n\nAt two."),
        ]
    },
    "tools": {
        "messages": [
            turn("user", "What time is it in Oslo?"),
            turn("assistant", None, tool_calls=[CALL]),
            turn("tool", '{"time": "12:00"}', tool_call_id="abcdef123"),
            turn("assistant", "Noon."),
        ],
        "tools": TOOLS,
    },
    "prompt and completion": {"prompt": [QUESTION, ANSWER, MORE[0]], "completion": MORE[1:]},
}


def examples_of(
    record: dict[str, Any], tokenizer: Any, config: DataConfig | None = None
) -> list[Example]:
    """Return what is trained of one record."""
    config = config or DataConfig()
    return tokenize_rows(load_rows([record], config), tokenizer, config, LIMITS)


def target_texts(example: Example, tokenizer: Any) -> list[str]:
    """Return the texts that carry loss, each a run of tokens."""
    runs: list[list[int]] = []
    labels = [IGNORE, *example.labels]  # type: ignore[misc]
    for before, label in zip(labels, labels[1:], strict=False):
        if label != IGNORE:
            runs += [[]] if before == IGNORE else []
            runs[-1].append(int(label))
    return [str(tokenizer.decode(run)) for run in runs]


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield template, chat, and in words what becomes of it: the same with every tokenizer."""
    for template in NAMES:
        for name, record in CHATS.items():
            found = {_fate(record, with_template(kind, template)[0]) for kind in TOKENIZERS}
            assert len(found) == 1, (template, name, found)
            yield template, name, found.pop()


def page() -> str:
    """Return the page with the table made anew."""
    text = PAGE.read_text(encoding="utf-8")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{table()}\n{END}{text.partition(END)[2]}"


def table() -> str:
    """Return the rows as a table of Markdown: a line for each template, a column for each chat."""
    lines = [["template", "what it does", *CHATS], ["---"] * (len(CHATS) + 2)]
    fates = {(template, chat): fate for template, chat, fate in rows()}
    for template in NAMES:
        text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        does = text.partition("{#")[2].partition("#}")[0].strip().replace("|", "/")
        lines.append([f"`{template}`", does, *(fates[template, chat] for chat in CHATS)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _fate(record: dict[str, Any], tokenizer: Any) -> str:
    try:
        examples = examples_of(record, tokenizer)
    except DataError as error:
        reason = str(error).partition(": the chat template ")[2].partition(";")[0]
        return f"refused: {reason}"
    answers = sum(len(target_texts(example, tokenizer)) for example in examples)
    return f"{answers} in {len(examples)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Without transformers a text has the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from edge_sdk.data.fast_tokenizer import PlainTokenizer
from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.data.templates import ChatTemplate
from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
from edge_sdk.errors import DataError, ModelError

TEXTS = [
    "The boat leaves at noon.",
    "",
    " two  spaces\nand a line",
    "caf\u00e9 \u4f60\u597d",
    "<s> x </s>",
]
CHAT = """{% for m in messages %}{% if m['role'] == 'assistant' %}
>{% generation %}{{ m['content'] | trim }}{{ eos_token }}{% endgeneration %}

{% continue %}{% endif %}
{{ bos_token }}[{{ m['role'] }}] {{ {"t": m['content']} | tojson }}
    {% endfor %}{% if add_generation_prompt %}>{% endif %}"""


@pytest.fixture(params=["stories260K/hf", "base"])
def folder(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Path:
    """A real tokenizer, with a chat template of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared_data / request.param / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    return tmp_path


def pair(folder: Path) -> tuple[Any, PlainTokenizer]:
    """The tokenizer of transformers, and ours."""
    return AutoTokenizer.from_pretrained(folder), PlainTokenizer(folder)


def test_texts_have_the_tokens_of_transformers(folder: Path) -> None:
    """Alone and together, with and without special tokens, cut or whole."""
    reference, plain = pair(folder)
    quiet = {"return_attention_mask": False, "verbose": False}
    for settings in ({}, {"add_special_tokens": False}):
        wanted = reference(TEXTS, **quiet, **settings)["input_ids"]
        assert plain(TEXTS, **quiet, **settings)["input_ids"] == wanted
    for text in TEXTS:
        wanted = reference(text, truncation=True, max_length=3, verbose=False)["input_ids"]
        assert plain(text, truncation=True, max_length=3, verbose=False)["input_ids"] == wanted
        assert plain(text)["input_ids"] == reference(text)["input_ids"]


def test_special_tokens_are_those_of_transformers(folder: Path) -> None:
    """Beginning, end, all of them, and the size of the vocabulary."""
    reference, plain = pair(folder)

    assert len(plain) == len(reference)
    assert (plain.bos_token_id, plain.eos_token_id) == (
        reference.bos_token_id,
        reference.eos_token_id,
    )
    assert set(plain.all_special_ids) == set(reference.all_special_ids)


def test_chats_are_rendered_as_by_transformers(folder: Path) -> None:
    """Whitespace, filters, special tokens and the opening of an answer."""
    reference, plain = pair(folder)
    turns = [
        {"role": "user", "content": 'Say "\u00fc" <b>'},
        {"role": "assistant", "content": " yes "},
    ]
    for asks in (False, True):
        settings = {"tokenize": False, "add_generation_prompt": asks}
        wanted = reference.apply_chat_template(turns, **settings)
        for tokenizer in (reference, plain):
            assert ChatTemplate(tokenizer, {}).render(turns, ask=asks).text == wanted


def test_named_templates_are_found_as_by_transformers(folder: Path) -> None:
    """A template of its own for tools lies beside the first, or both in the settings."""
    texts = {"default": "{{ messages | length }}", "tool_use": "{{ tools | tojson }}"}
    (folder / "chat_template.jinja").write_text(texts["default"])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(texts["tool_use"])
    assert [t.chat_template for t in pair(folder)] == [texts, texts]

    (folder / "chat_template.jinja").unlink()
    shutil.rmtree(folder / "additional_chat_templates")
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings["chat_template"] = [{"name": n, "template": text} for n, text in texts.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    assert [t.chat_template for t in pair(folder)] == [texts, texts]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "A small bird sees the river."},
        {"prompt": "Say boat.", "completion": " boat"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "old house", "label": 1},
    ],
)
def test_rows_become_the_same_examples(folder: Path, row: dict[str, Any]) -> None:
    """Every schema, through the code that every device runs."""
    limits = ModelLimits(vocab_size=4096, max_positions=128, num_labels=2)
    rows = load_rows([row], DataConfig())
    found = [tokenize_rows(rows, tokenizer, DataConfig(), limits)[0] for tokenizer in pair(folder)]

    assert found[0].input_ids.tolist() == found[1].input_ids.tolist()
    wanted = found[0].labels if isinstance(found[0].labels, int) else found[0].labels.tolist()
    own = found[1].labels if isinstance(found[1].labels, int) else found[1].labels.tolist()
    assert own == wanted


def test_a_template_may_refuse(folder: Path) -> None:
    """Its own words reach the reader, behind file and line."""
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    rows = load_rows([{"messages": [{"role": "assistant", "content": "b"}]}], DataConfig())

    with pytest.raises(DataError, match="no system turns"):
        tokenize_rows(rows, PlainTokenizer(folder), DataConfig(), ModelLimits(vocab_size=4096))  # type: ignore[arg-type]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    """One line that says what is missing and how it is made."""
    with pytest.raises(ModelError, match=r"no tokenizer.json; .*save_pretrained"):
        PlainTokenizer(tmp_path)

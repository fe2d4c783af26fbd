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
from edge_sdk.model.safetensors_files import map_part
from edge_sdk.model.weights import ModelSource
from tests.edge_sdk.data.template_cases import tokenizer_folder
from tests.tiny import make_config, make_model

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    model: Any = make_model(make_config("llama"), "causal-lm")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "made_by", "is_rewritten"),
    [
        ("sentencepiece", "LlamaTokenizer", True),
        ("no prefix", "LlamaTokenizer", True),
        ("byte-level", "GPTNeoXTokenizer", True),
        ("sentencepiece", "PreTrainedTokenizerFast", False),
        ("byte-level", "GPT2Tokenizer", False),
    ],
)
def test_a_tokenizer_travels_as_transformers_reads_it(
    kind: str, made_by: str, is_rewritten: bool, llama: Path, tmp_path: Path
) -> None:
    """Where a class of transformers makes the tokenizer anew, a device without it has that one."""
    folder = Path(shutil.copytree(llama, tmp_path / "served"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder(kind) / name, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings["tokenizer_class"] = made_by
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (tmp_path / "files").write_bytes(ModelSource(str(folder), "causal-lm").pack("files"))
    device = tmp_path / "device"
    device.mkdir()
    for name, stored in map_part(tmp_path / "files").items():
        (device / name).write_bytes(stored.array.tobytes())

    own = (folder / "tokenizer.json").read_bytes()
    assert ((device / "tokenizer.json").read_bytes() != own) == is_rewritten
    reference = AutoTokenizer.from_pretrained(folder)
    for tokenizer in (PlainTokenizer(device), AutoTokenizer.from_pretrained(device)):
        for text in [*TEXTS, "<s>[INST] a  b[/INST] c</s>\n", "### user:\n\n a"]:
            for settings in ({}, {"add_special_tokens": False}):
                wanted = reference(text, **settings)["input_ids"]
                assert tokenizer(text, **settings)["input_ids"] == wanted

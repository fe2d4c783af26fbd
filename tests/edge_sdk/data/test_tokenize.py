"""Rows to ids and targets: exact boundaries, loss where it belongs, and limits that hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.rows import DataConfig, load_rows
from edge_sdk.data.tokenize import Example, ModelLimits, check_tokenizer, tokenize_rows
from edge_sdk.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
BASE = ROOT / "examples" / "base"
GPT2 = ROOT.parent / "shared" / "data" / "gpt2_tokenizer"
LIMITS = ModelLimits(vocab_size=4096, max_positions=512)
EOS = 0
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(**options: Any) -> Any:
    """Return a fresh copy of the base model's tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(BASE, **options)


TOKENIZER = make_tokenizer()


def examples_of(
    records: list[dict[str, Any]],
    config: DataConfig | None = None,
    limits: ModelLimits = LIMITS,
    tokenizer: Any = TOKENIZER,
) -> list[Example]:
    """Load and tokenise *records*."""
    config = config or DataConfig()
    return tokenize_rows(load_rows(records, config), tokenizer, config, limits)


def ids_of(text: str) -> list[int]:
    """Return the ids of *text* alone."""
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return ids


def targets_of(example: Example) -> str:
    """Return the text that carries loss."""
    assert not isinstance(example.labels, int)
    text: str = TOKENIZER.decode([label for label in example.labels if label != IGNORE])
    return text


# ---- causal --------------------------------------------------------------------------------------


def test_text_is_target_throughout() -> None:
    """Plain text carries loss everywhere and ends with the end-of-text token."""
    (example,) = examples_of([{"text": "The boat leaves."}])

    assert example.input_ids.tolist() == [*ids_of("The boat leaves."), EOS]
    assert example.input_ids.dtype == np.int32
    assert np.array_equal(example.labels, example.input_ids)
    assert example.where == "row:1"


# Short enough for the model in tokens, of which a character may be four.
printable = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=60)


@given(printable, printable.filter(str.strip), st.sampled_from(["\n", " ", ""]))
def test_the_boundary_is_exact(prompt: str, completion: str, separator: str) -> None:
    """The model is trained on exactly the prompt tokens that it sees at inference."""
    config = DataConfig(separator=separator)

    (example,) = examples_of([{"prompt": prompt, "completion": completion}], config)

    context, answer = ids_of(prompt + separator), [*ids_of(completion), EOS]
    assert example.input_ids.tolist() == context + answer
    assert np.asarray(example.labels).tolist() == [IGNORE] * len(context) + answer


def test_end_of_text_can_be_left_out() -> None:
    """Without `append_eos` the last target is the last token of the completion."""
    config = DataConfig(append_eos=False)

    (example,) = examples_of([{"prompt": "a", "completion": "b c"}], config)

    assert targets_of(example) == "b c"
    assert example.input_ids[-1] == ids_of("b c")[-1]


def test_a_token_of_the_beginning_carries_no_loss() -> None:
    """Where the tokenizer puts a token before every text, we do too, and it is no target."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    bos = ("<|endoftext|>", EOS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair=None, special_tokens=[bos]
    )

    (text,) = examples_of([{"text": "a b"}], tokenizer=tokenizer)
    (pair,) = examples_of([{"prompt": "a", "completion": "b"}], tokenizer=tokenizer)

    assert text.input_ids.tolist() == [EOS, *ids_of("a b"), EOS]
    assert np.asarray(text.labels).tolist() == [IGNORE, *ids_of("a b"), EOS]
    assert pair.input_ids.tolist() == [EOS, *ids_of("a\n"), *ids_of("b"), EOS]


def test_many_rows_keep_their_order() -> None:
    """Rows are tokenised in chunks, and each keeps its text and its place."""
    records = [{"text": f"number {i}"} for i in range(1100)]

    examples = examples_of(records, DataConfig(append_eos=False))

    assert [targets_of(example) for example in examples] == [r["text"] for r in records]
    assert examples[-1].where == "row:1100"


@pytest.mark.parametrize("schema", ["text", "label"])
def test_long_rows_are_refused_with_a_remedy(schema: str) -> None:
    """A row over the limit is named with its length, the limit and what to set."""
    config = DataConfig(max_length=8)
    record = {"text": "one two three " * 20} | ({"label": 0} if schema == "label" else {})

    with pytest.raises(DataError) as caught:
        examples_of([record], config)

    length = len(ids_of(record["text"])) + (schema == "text")  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"row:1: has {length} tokens, allowed are 8")
    assert "`too_long: cut`" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (8, "`max_length` allows more, at most 512"),
        (512, "more than 512 are not to be had here"),
        (None, "more than 512 are not to be had here"),
    ],
)
def test_more_is_promised_only_where_it_can_be_had(wanted: int | None, words: str) -> None:
    """`max_length` is named as a remedy while it is below what the run and its model take."""
    with pytest.raises(DataError) as caught:
        examples_of([{"text": "one two three " * 400}], DataConfig(max_length=wanted))

    assert words in str(caught.value)


@given(st.integers(2, 30), st.integers(1, 60))
def test_cut_rows_keep_their_beginning(max_length: int, num_words: int) -> None:
    """With `too_long: cut` a sequence is the first tokens of the whole one, never more."""
    record = {"text": "sea " * num_words}
    config = DataConfig(max_length=max_length, too_long="cut")

    (whole,) = examples_of([record])
    (cut,) = examples_of([record], config)

    assert np.array_equal(cut.input_ids, whole.input_ids[:max_length])
    assert np.array_equal(cut.labels, cut.input_ids)


def test_the_model_limits_the_length_too() -> None:
    """Without `max_length` the positions of the model count; asking for more is a mistake."""
    with pytest.raises(DataError, match="allowed are 512"):
        examples_of([{"text": "sea " * 600}])
    with pytest.raises(ConfigError, match="max_length is 513, but the model takes 512"):
        examples_of([{"text": "sea"}], DataConfig(max_length=513))


@pytest.mark.parametrize(
    ("record", "config"),
    [
        ({"prompt": "one two three", "completion": "x"}, DataConfig(max_length=2, too_long="cut")),
        ({"prompt": "", "completion": "a"}, DataConfig(append_eos=False, separator="")),
        ({"text": "a"}, DataConfig(append_eos=False)),
    ],
)
def test_rows_without_a_target_are_refused(record: dict[str, str], config: DataConfig) -> None:
    """A row whose loss would be a mean over nothing is refused before the run starts."""
    with pytest.raises(DataError, match="row:1: holds no target"):
        examples_of([record], config)


# ---- tokenizers ----------------------------------------------------------------------------------


def test_an_empty_tokenizer_is_refused() -> None:
    """The tokenizer that transformers 5 builds from absent files is caught."""
    empty = transformers.GPT2TokenizerFast(vocab_file="absent.json")

    with pytest.raises(DataError, match="empty vocabulary"):
        examples_of([{"text": "a b"}], tokenizer=empty)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    """Ids that the embedding does not have are caught, at once or at the row that has them."""
    with pytest.raises(DataError, match="not that of the model"):
        check_tokenizer(TOKENIZER, vocab_size=100)
    highest = max(ids_of("The boat leaves at noon."))
    rare = TOKENIZER.decode([4095])
    limits = ModelLimits(vocab_size=highest + 1)
    with pytest.raises(DataError, match=r"row:2: gives token \d+, but the model knows ids below"):
        examples_of([{"text": "The boat"}, {"text": f"The boat{rare} {rare}"}], limits=limits)


@pytest.mark.skipif(not GPT2.exists(), reason="shared/data/gpt2_tokenizer is not on this machine")
def test_a_tokenizer_without_an_end_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2's bare files name no end-of-text token: nothing is appended, and the log says so."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(GPT2)

    (example,) = examples_of(
        [{"text": "Hello world"}], limits=ModelLimits(vocab_size=50257), tokenizer=tokenizer
    )

    assert example.input_ids.tolist() == [15496, 995]
    assert "tokenize.no_eos" in caplog.text


# ---- chat ----------------------------------------------------------------------------------------


def chat(*contents: str) -> dict[str, Any]:
    """Return a chat in which user and assistant take turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def chat_tokenizer(template: str) -> Any:
    """Return a tokenizer with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_loss_is_on_the_turns_of_the_assistant() -> None:
    """Every answer is a target up to the end of its turn; questions and headers are not."""
    tokenizer = chat_tokenizer(CHATML)

    (example,) = examples_of([chat("q1", "a1", "q2", "a2")], tokenizer=tokenizer)

    assert targets_of(example) == "a1<|end|>\na2<|end|>\n"
    whole = "<|user|>q1<|end|>\n<|assistant|>a1<|end|>\n<|user|>q2<|end|>\n<|assistant|>a2<|end|>\n"
    assert TOKENIZER.decode(example.input_ids) == whole


def test_what_follows_the_last_answer_is_left_out() -> None:
    """A question that nobody answers costs no compute."""
    tokenizer = chat_tokenizer(CHATML)

    (example,) = examples_of([chat("q1", "a1", "q2")], tokenizer=tokenizer)

    assert TOKENIZER.decode(example.input_ids).endswith("a1<|end|>\n")


def test_a_chat_may_begin_with_the_assistant() -> None:
    """A greeting before any question is an answer too."""
    messages = [{"role": "assistant", "content": "hi"}]

    (example,) = examples_of([{"messages": messages}], tokenizer=chat_tokenizer(CHATML))

    assert targets_of(example).endswith("hi<|end|>\n")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "no chat template"),
        ("{{ raise_exception('no system turns') }}", "refuses it: no system turns"),
        ("{{ messages|length }}" + CHATML, "rewrites turn"),
        ("{% if", "refuses it"),
    ],
)
def test_chats_that_cannot_be_rendered_are_refused(template: str, words: str) -> None:
    """No template, one that refuses, and one without an exact boundary are named."""
    with pytest.raises(DataError, match=f"row:1: .*{words}"):
        examples_of([chat("q1", "a1", "q2", "a2")], tokenizer=chat_tokenizer(template))


# ---- classification ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "labels", "number"),
    [(2, (), 2), ("2", (), 2), ("good", ("bad", "good"), 1), (0, ("bad", "good"), 0)],
)
def test_labels_become_numbers(label: Any, labels: tuple[str, ...], number: int) -> None:
    """A label is a number, digits, or a name by its place in the list."""
    config = DataConfig(labels=labels)

    (example,) = examples_of([{"text": "a b", "label": label}], config)

    assert example.labels == number
    assert example.input_ids.tolist() == ids_of("a b")


@pytest.mark.parametrize(
    ("label", "labels", "num_labels", "words"),
    [
        ("good", (), None, "not a number; list them as `labels`"),
        ("fair", ("bad", "good"), None, "not one of the 2 `labels`"),
        (2, ("bad", "good"), None, "label is 2, must be at least 0 and below 2"),
        (77, (), 77, "label is 77, must be at least 0 and below 77"),
        (-1, (), None, "label is -1, must be at least 0"),
    ],
)
def test_unknown_labels_are_refused(
    label: Any, labels: tuple[str, ...], num_labels: int | None, words: str
) -> None:
    """A label outside the classes is named by line."""
    limits = ModelLimits(vocab_size=4096, num_labels=num_labels)

    with pytest.raises(DataError, match=f"row:1: .*{words}"):
        examples_of([{"text": "a", "label": label}], DataConfig(labels=labels), limits)


def test_more_labels_than_classes_is_a_mistake_of_the_configuration() -> None:
    """The head of the model must have a place for every name."""
    limits = ModelLimits(vocab_size=4096, num_labels=2)

    with pytest.raises(ConfigError, match="labels has 3 names, the model 2 classes"):
        examples_of([{"text": "a", "label": "x"}], DataConfig(labels=("x", "y", "z")), limits)


def test_a_cut_text_keeps_its_closing_token() -> None:
    """A classifier reads the token that closes a text, so cutting must not lose it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", pair=None, special_tokens=[("<|endoftext|>", EOS)]
    )
    config = DataConfig(max_length=5, too_long="cut")

    cut, short = examples_of(
        [{"text": "sea " * 9, "label": 1}, {"text": "sea", "label": 0}], config, LIMITS, tokenizer
    )

    assert cut.input_ids.tolist() == [*ids_of("sea " * 9)[:4], EOS]
    assert short.input_ids.tolist() == [*ids_of("sea"), EOS]

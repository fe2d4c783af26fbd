"""Chats as they are trained: after the text with which each answer is asked for, nothing lost."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from edge_sdk.data.encoding import IGNORE
from edge_sdk.data.rows import DataConfig
from edge_sdk.data.templates import ChatTemplate
from edge_sdk.data.tokenize import Example
from edge_sdk.errors import ConfigError, DataError
from tests.edge_sdk.data.template_cases import (
    ANSWER,
    CALL,
    CHATS,
    MORE,
    NAMES,
    PAGE,
    QUESTION,
    TOKENIZERS,
    TOOLS,
    both_tokenizers,
    examples_of,
    page,
    target_texts,
    turn,
    with_template,
)

KINDS = sorted(TOKENIZERS)


def outcome(record: dict[str, Any], tokenizer: Any, config: DataConfig | None = None) -> Any:
    """Return ids and labels of all examples, or the words of the refusal."""
    try:
        examples = examples_of(record, tokenizer, config)
    except DataError as error:
        return str(error)
    return [(e.input_ids.tolist(), np.asarray(e.labels).tolist()) for e in examples]


def ids_before_targets(example: Example) -> list[list[int]]:
    """Return the ids before each run of targets."""
    labels = [IGNORE, *example.labels]  # type: ignore[misc]
    starts = [
        i
        for i, (before, label) in enumerate(zip(labels, labels[1:], strict=False))
        if before == IGNORE and label != IGNORE
    ]
    return [example.input_ids[:start].tolist() for start in starts]


@pytest.mark.parametrize("template", NAMES)
def test_an_answer_follows_the_text_that_is_served(template: str) -> None:
    """What stands before an answer is what the template writes when that answer is asked for.

    The first answer of an example follows the very ids; those after it the very text.
    """
    for kind in KINDS:
        tokenizer, _ = with_template(kind, template)
        for name, record in CHATS.items():
            if isinstance(outcome(record, tokenizer), str):
                continue
            turns = record.get("messages") or [*record["prompt"], *record["completion"]]
            turns = [
                t | {"tool_calls": [CALL_AS_OBJECT]} if "tool_calls" in t else t for t in turns
            ]
            served = [
                tokenizer.apply_chat_template(
                    turns[:index],
                    tools=record.get("tools"),
                    add_generation_prompt=True,
                    return_dict=False,
                )
                for index in range(len(record.get("prompt", ())), len(turns))
                if turns[index]["role"] == "assistant"
            ]
            found = [ids_before_targets(example) for example in examples_of(record, tokenizer)]
            texts = [letters(tokenizer.decode(ids)) for before in found for ids in before]
            assert texts == [letters(tokenizer.decode(ids)) for ids in served], (kind, name)
            assert all(before[0] in served for before in found), (kind, name)


def letters(text: str) -> str:
    """Return *text* without blanks: some tokenizers put one after each special token."""
    return "".join(text.split())


CALL_AS_OBJECT = CALL | {"function": {"name": "time", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize("template", NAMES)
def test_both_tokenizers_make_the_same_examples(template: str) -> None:
    """A device without transformers trains on the same tokens, or refuses in the same words."""
    configs = [DataConfig(), DataConfig(answers="last", system_turn="user")]
    for kind in KINDS:
        reference, plain = with_template(kind, template)
        for name, record in CHATS.items():
            for config in configs:
                wanted = outcome(record, reference, config)
                assert outcome(record, plain, config) == wanted, (kind, name)


@pytest.mark.parametrize("template", NAMES)
def test_templates_are_rendered_as_by_transformers(template: str) -> None:
    """Every template writes the same text, tools and variables included."""
    reference, plain = with_template("byte-level", template)
    for record in CHATS.values():
        turns = record.get("messages") or [*record["prompt"], *record["completion"]]
        turns = [t | {"tool_calls": [CALL_AS_OBJECT]} if "tool_calls" in t else t for t in turns]
        for asks in (False, True):
            for variables in ({}, {"enable_thinking": False})[: 1 + (template == "qwen3")]:
                settings = {"tools": record.get("tools"), "add_generation_prompt": asks}
                try:
                    wanted = reference.apply_chat_template(
                        turns, tokenize=False, **settings, **variables
                    )
                except Exception:  # noqa: BLE001 - a template raises what it likes
                    continue
                for tokenizer in (reference, plain):
                    rendered = ChatTemplate(tokenizer, variables).render(
                        turns, record.get("tools", ()), ask=asks
                    )
                    assert rendered.text == wanted


# ---- which tokens carry loss ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marks", ["all answers", "the last one"])
@pytest.mark.parametrize("name", ["one answer", "two answers", "system", "thoughts"])
def test_marks_of_generation_are_those_of_transformers(kind: str, marks: str, name: str) -> None:
    """With `{% generation %}` the tokens that carry loss are those of transformers' own mask."""
    tokenizer, _ = with_template(kind, "marked")
    if marks == "the last one":
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "message.role == 'assistant' %}", "message.role == 'assistant' and loop.last %}"
        )
    encoded = tokenizer.apply_chat_template(
        CHATS[name]["messages"], return_dict=True, return_assistant_tokens_mask=True
    )

    (example,) = examples_of(CHATS[name], tokenizer)

    # The line end after the last mark is in both: it belongs to the turn.
    assert example.input_ids.tolist() == encoded["input_ids"]
    assert [int(label != IGNORE) for label in example.labels] == encoded["assistant_masks"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "variables"),
    [("marked_supplied", {}), ("supplied", {}), ("qwen3", {"enable_thinking": False})],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_generation_prompt_supplies_carries_no_loss(
    kind: str, template: str, variables: dict[str, Any]
) -> None:
    """An empty block of thoughts in the generation prompt is read, and is no target."""
    tokenizer, _ = with_template(kind, template)
    config = DataConfig(chat_template_kwargs=variables)

    examples = examples_of(CHATS["two answers"], tokenizer, config)

    found = [text for example in examples for text in target_texts(example, tokenizer)]
    assert [text.split("<|im_end|>")[0] for text in found] == [ANSWER["content"], "At two."]
    assert "<think></think>" in "".join(tokenizer.decode(examples[-1].input_ids).split())


def test_a_template_that_rewrites_gives_each_answer_its_own_example() -> None:
    """Qwen 3 takes the thoughts out of earlier answers: each is trained with its own."""
    tokenizer, _ = with_template("byte-level", "qwen3")

    first, second = examples_of(CHATS["thoughts"], tokenizer)

    assert target_texts(first, tokenizer) == [
        "<think>\nOld hill.\n</think>\n\nBehind it.<|im_end|>\n"
    ]
    assert target_texts(second, tokenizer) == ["<think>\nA clock.\n</think>\n\nAt two.<|im_end|>\n"]
    assert "Old hill" not in tokenizer.decode(second.input_ids)


def test_the_last_answer_alone_can_carry_loss() -> None:
    """With `answers: last` the earlier ones are read only, whatever the template does."""
    config = DataConfig(answers="last")
    for template in ("chatml", "qwen3"):
        tokenizer, _ = with_template("byte-level", template)

        (example,) = examples_of(CHATS["two answers"], tokenizer, config)

        (text,) = target_texts(example, tokenizer)
        assert text.endswith("At two.<|im_end|>\n")
        assert "It leaves at noon." in tokenizer.decode(example.input_ids)


def test_turns_of_tools_do_not_split_a_chat() -> None:
    """Where nothing is rewritten between two answers, both are of one example."""
    tokenizer, _ = with_template("byte-level", "llama3")

    (example,) = examples_of(CHATS["tools"], tokenizer)

    call = '{"name": "time", "parameters": {"city": "Oslo"}}<|eot|>'
    assert target_texts(example, tokenizer) == [call, "Noon.<|eot|>"]


def test_thoughts_go_on_where_the_generation_prompt_opens_them() -> None:
    """DeepSeek asks with `<think>` and takes thoughts out of what is written: they are learned."""
    tokenizer, _ = with_template("byte-level", "deepseek")
    config = DataConfig(chat_template_kwargs={"thinking": True})

    examples = examples_of(CHATS["thoughts"], tokenizer, config)

    found = [text for example in examples for text in target_texts(example, tokenizer)]
    assert found == [
        "Old hill.\n</think>\n\nBehind it.</s>",
        "A clock.\n</think>\n\nAt two.</s>",
    ]
    with pytest.raises(DataError, match="row:1: the chat template asks for turn 2 with '<think>'"):
        examples_of(CHATS["one answer"], tokenizer, config)


def test_thoughts_are_left_out_where_the_generation_prompt_closes_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Asked not to think, a model learns what its answers say, and the rows are counted."""
    tokenizer, _ = with_template("byte-level", "qwen3")
    config = DataConfig(chat_template_kwargs={"enable_thinking": False})

    examples = examples_of(CHATS["thoughts"], tokenizer, config)

    found = [text for example in examples for text in target_texts(example, tokenizer)]
    assert found == ["Behind it.<|im_end|>\n", "At two.<|im_end|>\n"]
    assert "data.shortened rows=1 first=row:1: the chat template leaves out" in caplog.text


def test_blanks_do_not_hide_what_the_generation_prompt_supplies() -> None:
    """A block of thoughts that both write, after other blanks, is supplied all the same."""
    tokenizer, _ = with_template("byte-level", "supplied")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content",
        "('\n<think>\n\n</think>\n\n' if message.role == 'assistant' else '') + message.content",
    )

    (example,) = examples_of(CHATS["one answer"], tokenizer)

    assert target_texts(example, tokenizer) == ["It leaves at noon.<|im_end|>\n"]


def test_a_variable_that_the_template_does_not_know_is_refused() -> None:
    """A slip in a name would train another text than the one that is served."""
    tokenizer, _ = with_template("byte-level", "qwen3")
    config = DataConfig(chat_template_kwargs={"enable_thinkin": False})

    with pytest.raises(ConfigError, match="the chat template knows no 'enable_thinkin'"):
        examples_of(CHATS["one answer"], tokenizer, config)


def test_what_opens_a_greeting_carries_no_loss() -> None:
    """Also an answer to nothing begins after its header."""
    tokenizer, _ = with_template("byte-level", "chatml")

    (example,) = examples_of({"messages": [turn("assistant", "Hello.")]}, tokenizer)

    assert target_texts(example, tokenizer) == ["Hello.<|im_end|>\n"]


# ---- nothing is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("llama3", '{"name": "time", "parameters": {"city": "Oslo"}}<|eot|>'),
        ("mistral", '[TOOL_CALLS] [{"name": "time", "arguments": {"city": "Oslo"}, "id": "abcd'),
        ("qwen3", '<tool_call>\n{"name": "time", "arguments": {"city": "Oslo"}}\n</tool_call>'),
        ("deepseek", '<|call|>time\n```json\n{"city": "Oslo"}\n```<|/call|></s>'),
    ],
)
def test_calls_reach_the_template_as_it_reads_them(
    template: str, wanted: str, arguments: Any
) -> None:
    """Arguments may be an object or JSON in the data, and are neither lost nor quoted twice."""
    tokenizer, _ = with_template("byte-level", template)
    call = CALL | {"function": {"name": "time", "arguments": arguments}}
    messages = [QUESTION, turn("assistant", None, tool_calls=[call])]

    (example,) = examples_of({"messages": messages}, tokenizer)

    assert wanted in "".join(target_texts(example, tokenizer))


def test_a_tool_may_answer_nothing() -> None:
    """Empty text stays empty text beside calls without content."""
    tokenizer, _ = with_template("byte-level", "chatml")
    content = "message.content"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        content, f"({content} if {content} is defined else message.tool_calls | tojson)"
    )
    messages = [QUESTION, turn("assistant", None, tool_calls=[CALL]), turn("tool", ""), ANSWER]

    (example,) = examples_of({"messages": messages}, tokenizer)

    assert "<|im_start|>tool\n<|im_end|>" in tokenizer_text(tokenizer, example)


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        ("deepseek", CHATS["tools"], "leaves out the tools"),
        ("chatml", {"messages": [QUESTION, ANSWER], "tools": TOOLS}, "leaves out the tools"),
        ("chatml", CHATS["tools"], "leaves out a call of turn 2"),
        ("phi", {"messages": [QUESTION, turn("tool", "7"), ANSWER]}, "leaves out turn 2, of role"),
        ("mistral", CHATS["system"], "no system turn; `system_turn: user`"),
        ("gemma", CHATS["system"], "no system turn; `system_turn: user`"),
        ("phi", CHATS["system"], "no system turn; `system_turn: user`"),
        ("gemma", {"messages": [QUESTION, MORE[0], ANSWER]}, "refuses it: Roles must alternate"),
        (
            "llama3",
            {"messages": [QUESTION, turn("assistant", None, tool_calls=[CALL, CALL])]},
            "refuses it: one call at a time",
        ),
    ],
)
def test_what_a_template_would_drop_is_refused(
    template: str, record: dict[str, Any], words: str
) -> None:
    """Tools, calls, turns of tools and of the system are written, or the row is refused."""
    tokenizer, _ = with_template("byte-level", template)

    with pytest.raises(DataError, match=f"row:1: the chat template (has )?.*{words}") as caught:
        examples_of(record, tokenizer)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", ["mistral", "gemma", "phi", "chatml"])
def test_a_system_turn_can_go_into_the_first_user_turn(template: str) -> None:
    """`system_turn: user` trains what a user turn that begins with the system's text would."""
    tokenizer, _ = with_template("byte-level", template)
    merged = turn("user", f"Be brief.\n\n{QUESTION['content']}")

    found = outcome(CHATS["system"], tokenizer, DataConfig(system_turn="user"))

    assert found == outcome({"messages": [merged, ANSWER]}, tokenizer)


def test_tools_have_a_template_of_their_own_where_there_is_one() -> None:
    """Of several templates that of tools is taken for rows with tools."""
    reference, plain = both_tokenizers("byte-level")
    for tokenizer in (reference, plain):
        tokenizer.chat_template = {
            "default": "{{ messages[0].content }}>{{ messages[1].content if messages[1] }}",
            "tool_use": "{{ tools | tojson }}{{ messages[0].content }}>"
            "{{ messages[1].content if messages[1] }}",
        }
        record = {"messages": [QUESTION, ANSWER]}

        (without,) = examples_of(record, tokenizer)
        (with_tools,) = examples_of(record | {"tools": TOOLS}, tokenizer)

        assert json.dumps(TOOLS) not in tokenizer_text(reference, without)
        assert json.dumps(TOOLS) in tokenizer_text(reference, with_tools)


def tokenizer_text(tokenizer: Any, example: Example) -> str:
    """Return the text of an example."""
    return str(tokenizer.decode(example.input_ids))


def test_the_table_of_the_page_is_up_to_date() -> None:
    """docs/data.md says what becomes of each chat, the same with every kind of tokenizer."""
    assert PAGE.read_text(encoding="utf-8") == page()

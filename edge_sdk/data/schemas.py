"""Which columns make a sample, and the one form in which every schema leaves.

Knows no file format (readers.py) and no tokenizer. Messages name the place and the column, and
never quote a sample: the data is private and errors travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from edge_sdk.data.turns import Turn, read_tools, read_turns, targets_of, text_of
from edge_sdk.errors import DataError

Schema = Literal["text", "completion", "chat", "label"]
"""What a row is, whatever its columns were called."""
SCHEMAS: dict[Schema, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
}
"""The columns that make each schema under our own names."""


class Columns(NamedTuple):
    """Columns by which a schema is known."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


# Those of other tools come second: to a row that has our columns too, they are other columns.
OURS: dict[str, Columns] = {
    "text": Columns(("text",)),
    "completion": Columns(("prompt", "completion"), ("tools",)),
    "chat": Columns(("messages",), ("tools", "functions")),
    "label": Columns(("text", "label")),
}
THEIRS: dict[str, Columns] = {
    "Alpaca": Columns(("instruction", "output"), ("input", "system", "history")),
    "ShareGPT": Columns(("conversations",), ("system", "tools")),
}
WORDS = tuple(
    dict.fromkeys(
        word
        for known in (*OURS.values(), *THEIRS.values())
        for word in (*known.needed, *known.optional)
    )
)
"""All columns that a row may use."""
ALLOWED = (
    "text; prompt and completion; messages; text and label; instruction and output (Alpaca); "
    "or conversations (ShareGPT)"
)
PREFERENCES = ("chosen", "rejected")
UNWANTED = ("label", "kto_tag")  # where they are false, the answer is one to keep away from
# The prompt of the Alpaca data set, with and without `input`.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)

Fields = dict[str, Any]
"""What a `Row` is made of: `schema`, and what belongs to it."""


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a mapping that does not name the columns of exactly one schema.

    Raises:
        ValueError: It names too few, too many, or none of ours.
    """
    if not columns:
        return
    words = set(columns)
    if not any(
        set(known.needed) <= words <= {*known.needed, *known.optional}
        for known in (*OURS.values(), *THEIRS.values())
    ):
        raise ValueError(f"columns must name {ALLOWED}; got {sorted(columns)}")
    if not all(isinstance(column, str) and column for column in columns.values()):
        raise ValueError(f"columns must map to names of columns, got {dict(columns)}")


def read_fields(
    record: Any, where: str, columns: Mapping[str, str], alpaca: Literal["prompt", "chat"]
) -> tuple[str, Fields]:
    """Return the name of a record's schema, and its fields checked.

    Args:
        record: What a reader has found, hopefully a dictionary.
        where: Its place, for messages.
        columns: Our word -> their column; empty: the columns have our names.
        alpaca: What a row of Alpaca becomes.

    Raises:
        DataError: Not a dictionary, no or several schemas, or an unusable value.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: is {type(record).__name__}, not an object with named columns")
    if columns:
        found_values = {word: record.get(column) for word, column in columns.items()}
    else:
        found_values = {word: record[word] for word in WORDS if word in record}
    values = {word: value for word, value in found_values.items() if value is not None}
    name = _schema(values.keys(), record, where, columns)
    if not columns:
        _refuse_preference(name, record, where)
    match name:
        case "text":
            found: Fields = {"schema": "text", "text": _text(values, "text", where)}
        case "label":
            label = _label(values["label"], where)
            found = {"schema": "label", "text": _text(values, "text", where), "label": label}
        case "chat":
            found = _chat(read_turns(values["messages"], where, "messages"), values, where)
        case "ShareGPT":
            turns = read_turns(values["conversations"], where, "conversations")
            found = _chat((*_system(values, where), *turns), values, where)
        case "Alpaca":
            found = _alpaca(values, where, alpaca)
        case _:
            found = _completion(values, where)
    return name, found


def _schema(
    words: Iterable[str], record: Mapping[str, Any], where: str, columns: Mapping[str, str]
) -> str:
    """Return the name of the one schema whose columns are all among *words*."""
    present = frozenset(words)
    found = _fitting(present)
    if columns:
        known = OURS | THEIRS
        wanted = set(columns) - {word for name in found for word in known[name].optional}
        if lost := sorted(columns[word] for word in wanted - present):
            raise DataError(f"{where}: lacks {', '.join(lost)}; it has {_having(record)}")
    if len(found) > 1:
        raise DataError(f"{where}: could be {' or '.join(found)}; say which with `columns`")
    if not found:
        _refuse_preference("", record, where)
        names = f"needs {ALLOWED}; it has {_having(record)}"
        raise DataError(f"{where}: {names}. Map names with `columns`")
    return found[0]


def _refuse_preference(schema: str, record: Mapping[str, Any], where: str) -> None:
    """Refuse a row that holds what is not wanted: nothing here learns from that.

    A row with our own columns may have those of a preference beside them, as it always could.
    """
    if schema not in OURS and any(record.get(column) is not None for column in PREFERENCES):
        remedy = "map `columns` to prompt and completion to train on the chosen ones"
        raise DataError(f"{where}: is a preference (chosen, rejected), no sample; {remedy}")
    for column in UNWANTED:
        if schema not in ("text", "label") and record.get(column) is False:
            remedy = "take such rows out to train on the wanted ones"
            raise DataError(f"{where}: is a preference ({column}: false), no sample; {remedy}")


@lru_cache
def _fitting(present: frozenset[str]) -> tuple[str, ...]:
    """Return the schemas whose columns are all *present*: ours, or else those of other tools."""
    for known in (OURS, THEIRS):
        if found := [name for name, one in known.items() if present.issuperset(one.needed)]:
            return tuple(name for name in found if name != "text" or "label" not in found)
    return ()


def _having(record: Mapping[str, Any]) -> str:
    """Return the names of the columns that hold something."""
    have = sorted(str(column) for column, value in record.items() if value is not None)
    return ", ".join(have[:20]) or "no values"


def _text(values: Mapping[str, Any], word: str, where: str) -> str:
    return text_of(values[word], where, word, may_be_empty=False)


def _label(value: Any, where: str) -> int | str:
    """Return *value* if it can stand for a class."""
    if isinstance(value, str) and value.strip():
        return value
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return int(value)
    raise DataError(f"{where}: label is {type(value).__name__}, not a number or a name")


def _chat(turns: tuple[Turn, ...], values: Mapping[str, Any], where: str, first: int = 0) -> Fields:
    """Return the fields of a chat whose turns from *first* may carry loss."""
    targets = targets_of(turns, first)
    if not targets:
        raise DataError(f"{where}: messages hold no turn of the assistant, nothing to learn")
    # `functions` is what OpenAI called them before.
    tools = read_tools(values.get("tools") or values.get("functions") or [], where)
    return {"schema": "chat", "messages": turns, "targets": targets, "tools": tools}


def _system(values: Mapping[str, Any], where: str) -> list[Turn]:
    """Return the turn that a column `system` stands for."""
    text = text_of(values.get("system", ""), where, "system", may_be_empty=True)
    return [{"role": "system", "content": text}] if text.strip() else []


def _completion(values: Mapping[str, Any], where: str) -> Fields:
    """Return the fields of a prompt with its completion, both text or both turns."""
    prompt, completion = values["prompt"], values["completion"]
    are_turns = [isinstance(value, list | tuple) for value in (prompt, completion)]
    if any(are_turns) and not all(are_turns):
        prompt_is, completion_is = ("a list of turns" if one else "text" for one in are_turns)
        what = f"prompt is {prompt_is}, completion is {completion_is}; both must be the same"
        raise DataError(f"{where}: {what}")
    if not any(are_turns):
        return {
            "schema": "completion",
            "prompt": text_of(prompt, where, "prompt", may_be_empty=True),
            "completion": _text(values, "completion", where),
        }
    asked = read_turns(prompt, where, "prompt")
    if asked[-1]["role"] == "assistant":
        raise DataError(f"{where}: prompt ends with a turn of the assistant, which is no question")
    turns = (*asked, *read_turns(completion, where, "completion"))
    return _chat(turns, values, where, first=len(asked)) | {"asked": len(asked)}


def _alpaca(values: Mapping[str, Any], where: str, becomes: Literal["prompt", "chat"]) -> Fields:
    """Return the fields of a row of Alpaca: as the prompt of that data set, or as a chat."""
    question = text_of(values.get("input", ""), where, "input", may_be_empty=True)
    # The instruction may stand in `input` alone, but something must be asked.
    is_alone = not question.strip()
    asked = text_of(values["instruction"], where, "instruction", may_be_empty=not is_alone)
    answer, system = _text(values, "output", where), _system(values, where)
    history = _history(values.get("history") or [], where)
    if becomes == "chat":
        content = asked if is_alone else f"{asked}\n\n{question}".strip()
        own = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return _chat((*system, *history, *own), {}, where)
    if history:
        raise DataError(f"{where}: has a history, which only `alpaca: chat` can read")
    head = system[0]["content"] if system else WITHOUT_INPUT if is_alone else WITH_INPUT
    parts = [head, f"### Instruction:\n{asked}"]
    parts += [] if is_alone else [f"### Input:\n{question}"]
    prompt = "\n\n".join([*parts, "### Response:"])
    return {"schema": "completion", "prompt": prompt, "completion": answer}


def _history(pairs: Any, where: str) -> list[Turn]:
    """Return the turns of earlier questions with their answers."""
    turns: list[Turn] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"{where}: history must be a list of questions with their answers")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = text_of(text, where, "history", may_be_empty=False)
            turns.append({"role": role, "content": content})
    return turns

"""Turns of a chat, as OpenAI, ShareGPT and their kin write them, checked and made the same.

A turn leaves here as chat templates expect it: `role` and `content`, with tools `tool_calls` (whose
arguments are objects, not JSON as text), `tool_call_id` and `name`. Messages never quote a sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from edge_sdk.errors import DataError

Turn = dict[str, Any]
# ShareGPT's names of speakers, and older ones, as templates know them.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
CALL = "function_call"  # a ShareGPT turn that is JSON of one call or of a list of calls


def read_turns(value: Any, where: str, word: str) -> tuple[Turn, ...]:
    """Return the turns of a chat, each checked and with the keys that templates know.

    Raises:
        DataError: No list, or a turn without a role or without content.
    """
    if isinstance(value, str):  # tables know no lists
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: {word} must be a list of turns")
    of = "" if word == "messages" else f" of {word}"
    return tuple(_turn(turn, f"turn {i}{of}", where) for i, turn in enumerate(value, start=1))


def targets_of(turns: Sequence[Turn], first: int = 0) -> tuple[int, ...]:
    """Return the positions from *first* of the assistant's turns, without those of weight 0."""
    return tuple(
        index
        for index, turn in enumerate(turns)
        if index >= first and turn["role"] == "assistant" and turn.get("weight") != 0
    )


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Return what a chat may call, each as `{"type": "function", "function": {...}}`.

    Raises:
        DataError: Neither a list of objects nor JSON of one.
    """
    if isinstance(value, str):  # tables know no objects
        value = _parsed(value, "tools", where) if value.strip() else []
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: tools is {type(value).__name__}, not a list of objects")
    tools: list[dict[str, Any]] = []
    for number, tool in enumerate(value, start=1):
        if not isinstance(tool, Mapping):
            raise DataError(f"{where}: tool {number} is {type(tool).__name__}, not an object")
        found = _without_nulls(tool)
        tools.append(found if "function" in found else {"type": "function", "function": found})
    _check_unicode(tools, "tools", where)
    return tuple(tools)


def text_of(value: Any, where: str, word: str, *, may_be_empty: bool) -> str:
    """Return *value* if it is text that a tokenizer can take.

    Raises:
        DataError: No text, empty, or with half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {word} is {type(value).__name__}, not text")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where}: {word} is empty")
    _check_unicode(value, word, where)
    return value


def _turn(value: Any, name: str, where: str) -> Turn:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: {name} is not an object")
    turn: Turn = _without_nulls(value)
    if "role" not in turn and "from" in turn:
        turn = {"role": turn.pop("from"), "content": turn.pop("value", None), **turn}
    role = text_of(turn.get("role"), where, f"role of {name}", may_be_empty=False).strip()
    if role == CALL:
        calls = _parsed(text_of(turn.get("content"), where, name, may_be_empty=False), name, where)
        turn |= {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
        role = "assistant"
    if CALL in turn:  # OpenAI's form before there were tools
        turn["tool_calls"] = [turn.pop(CALL)]
    turn["role"] = ROLES.get(role, role)
    if turn.get("tool_calls"):
        turn["tool_calls"] = _calls(turn["tool_calls"], name, where)
    else:
        turn.pop("tool_calls", None)
    turn["content"] = _content(turn, name, where)
    _check_unicode(turn, name, where)
    return turn


def _content(turn: Turn, name: str, where: str) -> str | None:
    """Return what a turn says: text, also where it comes in parts; None beside calls alone."""
    content, word = turn.get("content"), f"content of {name}"
    if content is None and "tool_calls" in turn:
        return None
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, word, where) for part in content)
    # What a turn answers may be empty, what is to be learned may not.
    may_be_empty = turn["role"] != "assistant" or "tool_calls" in turn
    return text_of(content, where, word, may_be_empty=may_be_empty)


def _part(part: Any, word: str, where: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: {word} has a part that is not text (an image, a sound?)")
    return text


def _calls(calls: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Return the calls of a turn as OpenAI has them, but with arguments as objects."""
    if isinstance(calls, str):
        calls = _parsed(calls, f"tool_calls of {name}", where)
    if not isinstance(calls, Sequence):
        raise DataError(f"{where}: tool_calls of {name} is {type(calls).__name__}, not a list")
    found = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise DataError(f"{where}: tool_calls of {name} holds {type(call).__name__}")
        call = _without_nulls(call)
        function = call if "function" not in call else call.pop("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tool_calls of {name} holds a call without a name")
        function = _without_nulls(function)
        arguments = function.get("arguments", function.pop("parameters", {}))
        function["arguments"] = _arguments(arguments)
        others = {} if function.keys() >= call.keys() else call
        found.append({"type": "function", **others, "function": function})
    return found


def _arguments(arguments: Any) -> Any:
    """Return the arguments of a call as an object where they are JSON of one."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {name} is not JSON") from error


def _without_nulls(found: Mapping[Any, Any]) -> dict[str, Any]:
    """Return *found* without null: tables fill keys with it that another row has."""
    return {str(key): item for key, item in found.items() if item is not None}


def _check_unicode(value: Any, word: str, where: str) -> None:
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {word} holds half of a surrogate pair") from error
    except (TypeError, ValueError) as error:  # rows from memory may hold anything
        raise DataError(f"{where}: {word} holds what is no JSON") from error

"""Chat templates, rendered alike on every device: jinja2 in a sandbox, as transformers has it.

A template comes with the model and so from the coordinator: it is a program of somebody else. It
sees plain JSON only, cannot change it, and whatever it raises is an error of this row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from edge_sdk.data.encoding import Span
from edge_sdk.errors import ConfigError, one_line

Turn = Mapping[str, Any]
# Noncharacters of Unicode, which no text holds, around what `{% generation %}` encloses.
MARK = re.compile(r"\{%[-+]?\s*generation\b")
OPEN, CLOSE = "\ufdd0", "\ufdd1"
# Where a turn keeps its thoughts; templates read the first, gpt-oss the second.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class TemplateRefusal(Exception):  # noqa: N818 - what a template says of a chat, no fault of ours
    """The template does not take this chat; the message is the template's own."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A chat as text."""

    text: str
    generated: tuple[Span, ...] = ()
    """What the template marks as written by the assistant."""


class ChatTemplate:
    """The chat template of a tokenizer, with the variables that the user sets."""

    def __init__(
        self, tokenizer: Any, variables: Mapping[str, Any], path: Path | None = None
    ) -> None:
        """Take the template of *tokenizer*, or the one at *path*; *variables* go before its tokens.

        Raises:
            ConfigError: The template has no such variable, or its file cannot be read.
        """
        found = getattr(tokenizer, "chat_template", None) if path is None else _read(path)
        self._now = datetime.now()
        self._sources: dict[str, str] = (
            found if isinstance(found, dict) else {"default": found or ""}
        )
        self._variables = {**tokenizer.special_tokens_map, **variables}
        if variables and self.is_there:
            known = set().union(*map(_names, self._sources.values()))
            if unknown := sorted(set(variables) - known):
                listed = ", ".join(map(repr, unknown))
                raise ConfigError(f"chat_template_kwargs: the chat template knows no {listed}")

    @property
    def is_there(self) -> bool:
        """Whether there is a template."""
        return any(self._sources.values())

    @property
    def marks(self) -> bool:
        """Whether the template marks what the assistant writes, by `{% generation %}`."""
        return any(MARK.search(source) for source in self._sources.values())

    def render(
        self, turns: Sequence[Turn], tools: Sequence[Turn] = (), *, ask: bool = False
    ) -> Rendered:
        """Return *turns* as text; *ask* opens the turn of the assistant.

        Raises:
            TemplateRefusal: The template raises, or cannot be read.
        """
        has_own = tools and self._sources.get("tool_use")
        source = self._sources.get("tool_use" if has_own else "default")
        if not source:
            raise TemplateRefusal("of its templates none is named `default`")
        try:
            marked: str = _compiled(source).render(
                messages=[_plain(turn) for turn in turns],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=ask,
                strftime_now=self._now.strftime,
                **self._variables,
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise TemplateRefusal(" ".join(str(error).split())[:200]) from error
        return _unmarked(marked)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read: {one_line(error)}") from error


def _plain(turn: Turn) -> dict[str, Any]:
    """Return a turn without null, and with its thoughts under the names that templates read."""
    found = {key: value for key, value in turn.items() if value is not None}
    thoughts = next((found[name] for name in THOUGHTS if name in found), None)
    if thoughts is None:
        return found
    return {"thinking": thoughts, **found, "reasoning_content": thoughts}


def _unmarked(marked: str) -> Rendered:
    """Return a text without its marks, and where they were."""
    if OPEN not in marked:
        return Rendered(marked)
    text, spans = "", []
    before, *pieces = marked.split(OPEN)
    text = before
    for piece in pieces:
        inside, _, outside = piece.partition(CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return Rendered(text, tuple(span for span in spans if span[0] < span[1]))


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """Return a template ready to render, with what transformers gives to chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` encloses what the assistant has written."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    def refuse(text: str) -> None:
        raise TemplateError(text)

    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    jinja.globals["raise_exception"] = refuse
    jinja.filters["tojson"] = _to_json
    return jinja.from_string(source)


@lru_cache(maxsize=8)
def _names(source: str) -> frozenset[str]:
    """Return the names that a template does not set itself; none where it cannot be read."""
    from jinja2 import TemplateError, meta

    try:
        jinja = _compiled(source).environment
        return frozenset(meta.find_undeclared_variables(jinja.parse(source)))
    except TemplateError:
        return frozenset()  # each chat is refused with the reason


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja's own, which escapes what HTML must not hold.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

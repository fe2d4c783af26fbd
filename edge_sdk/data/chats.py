"""Chats to samples: what the model reads when it is asked for an answer, and the answer it gives.

What goes before an answer is what the template writes when that answer is asked for, so that
training and use read the same text. Where a template leaves the text before an answer as it was
when the next one is asked for, both are of one sample; where it rewrites it (thoughts of earlier
answers are taken out), the next answer begins a sample of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from random import Random, SystemRandom
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

from edge_sdk.data.encoding import Segment
from edge_sdk.data.rows import DataConfig, Row
from edge_sdk.data.templates import THOUGHTS, ChatTemplate, Rendered, TemplateRefusal, Turn
from edge_sdk.errors import DataError

SYSTEM = ("system", "developer")
# Tags, bracketed words, single blanks, words: what a template writes in one piece.
PIECES = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\s|\w+|.")
TAG = re.compile(r"<(/?)(\w+)>")
# What a turn is, whom it answers, and what of a tool is no text: the keys of its JSON schema.
KEPT = ("role", "tool_call_id")
KEPT_OF_TOOLS = (*KEPT, "name", "type", "enum", "required", "format", "id", "$ref")
_KINDS = (ascii_lowercase, ascii_uppercase, digits)
_OTHERS = {letter: kind.replace(letter, "") for kind in _KINDS for letter in kind}
_DRAW = Random(SystemRandom().getrandbits(256)).random


def chat_samples(
    row: Row, template: ChatTemplate, config: DataConfig
) -> tuple[list[list[Segment]], bool]:
    """Return the samples of a chat, each as the segments of its text.

    Returns:
        The samples, and whether the template has left out a part of an answer.

    Raises:
        DataError: No template, the template refuses the chat, leaves out a turn, calls or tools,
            changes the turns before an answer when that answer is given, or lets what is learned
            depend on what others than the assistant say.
    """
    if not template.is_there:
        raise DataError(f"{row.where}: has messages, but the tokenizer has no chat template")
    turns, targets = [dict(turn) for turn in row.messages], list(row.targets)
    if config.system_turn == "user" and turns[0]["role"] in SYSTEM:
        merged = _system_in_user(turns, row.where)
        targets = [index + len(merged) - len(turns) for index in targets]
        turns = merged
    writer = _Writer(row.where, turns, row.tools, template)
    try:
        learned = targets[-1:] if config.answers == "last" else targets
        samples, is_shortened = writer.samples(learned)
        writer.check_roles(learned, samples)
        return samples, is_shortened
    except DataError:
        if writer.refuses_system():
            raise writer.no_system() from None
        raise


def _system_in_user(turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Return *turns* with the text of the first ones, the system's, in the first user turn."""
    system = list(takewhile(lambda turn: turn["role"] in SYSTEM, turns))
    others = turns[len(system) :]
    first = next((i for i, turn in enumerate(others) if turn["role"] == "user"), None)
    if first is None:
        raise DataError(f"{where}: has a system turn, but no user turn that could take it")
    text = "\n\n".join(turn["content"] for turn in [*system, others[first]])
    return [*others[:first], others[first] | {"content": text}, *others[first + 1 :]]


class _Writer:
    """Makes the text of one chat."""

    def __init__(
        self, where: str, turns: list[dict[str, Any]], tools: Sequence[Turn], template: ChatTemplate
    ) -> None:
        self._where, self._turns, self._tools, self._template = where, turns, tools, template
        self._written: dict[tuple[int, bool], Rendered] = {}

    # ---- samples ----

    def samples(self, targets: Sequence[int]) -> tuple[list[list[Segment]], bool]:
        """Return the samples in which the turns at *targets* carry loss; see chat_samples."""
        self._turns = self._in_form_that_is_taken(targets[-1])
        return self._samples(targets)

    def _samples(
        self, targets: Sequence[int], *, checks: bool = True
    ) -> tuple[list[list[Segment]], bool]:
        samples: list[list[Segment]] = []
        done, checked, is_shortened = "", 0, False
        for index in targets:
            before = self._question(index)
            answer = self._answer(index, before)
            for earlier in range(checked, index) if checks else ():
                self._check_turn(earlier, index, ask=True)
            if checks:
                self._check_turn(index, index + 1)
            is_shortened = is_shortened or _is_shortened(self._turns[index], before, answer.text)
            if not samples or not before.startswith(done):
                samples.append([])
                done = ""
            samples[-1] += [Segment.context(before[len(done) :]), answer]
            done, checked = before + answer.text, index + 1
            written = self._render(index + 1)
            if self._template.marks and written.text == done:
                samples[-1] = _marked(samples[-1], written)
        if checks:
            self._check_tools(targets[0] + 1)
        return samples, is_shortened

    def check_roles(self, targets: Sequence[int], samples: Sequence[Sequence[Segment]]) -> None:
        """Refuse a template by which others than the assistant say something of what is learned.

        Whatever it does with their words: what is learned must be the same, to the letter, where
        they say other words, which nobody can foresee.
        """
        others = [
            turn if turn["role"] == "assistant" else other_words(turn) for turn in self._turns
        ]
        writer = _Writer(self._where, others, other_words(self._tools), self._template)
        try:
            again, _ = writer._samples(targets, checks=False)
        except DataError:
            again = []
        if _learned(again) != _learned(samples):
            raise DataError(
                f"{self._where}: what the chat template has learned depends on what others than "
                "the assistant say; it may be meant to hand their words out. Let "
                "data.chat_template name another template"
            )

    def _question(self, index: int) -> str:
        """Return the text that the model reads when the answer at *index* is asked for."""
        if index:
            return self._render(index, ask=True).text
        try:  # what opens an answer is never learned, but few templates render no turn at all
            opened = self._template.render([], self._tools, ask=True).text
        except TemplateRefusal:
            return ""
        return opened if self._render(1).text.startswith(opened) else ""

    def _answer(self, index: int, before: str) -> Segment:
        """Return what follows *before* where the answer at *index* is given."""
        written = self._render(index + 1)
        if written.text.startswith(before):
            return self._from(written, len(before))
        # The generation prompt may supply what the turn, once it is written, does not have: an
        # empty block of thoughts, say. It stays in what the model reads.
        plain = self._render(index).text if index else ""
        if not (before.startswith(plain) and written.text.startswith(plain)):
            what = f"the chat template rewrites turn {index} or one before it"
            remedy = "train on prompt + completion"
            raise DataError(f"{self._where}: {what} when turn {index + 1} follows; {remedy}")
        opening, body = before[len(plain) :], written.text[len(plain) :]
        shared = _shared(opening, body)
        supplied, rest = opening[shared:], body[shared:]
        if supplied.strip() and rest.lstrip().startswith(supplied.lstrip()):
            # Both have it, after other blanks.
            blanks = len(rest) - len(rest.lstrip())
            return self._from(written, len(plain) + shared + blanks + len(supplied.lstrip()))
        tag = _unbalanced(supplied)
        if tag is None:
            return self._from(written, len(plain) + shared)
        answer = _after_opening(_content(self._turns[index]), supplied, tag, rest)
        if answer is None:
            raise DataError(
                f"{self._where}: the chat template asks for turn {index + 1} with "
                f"{supplied.strip()!r} but writes it without; let the answers hold it "
                f"(`<{tag}>...</{tag}>answer`), or set `chat_template_kwargs`"
            )
        return Segment.target(answer)

    def _from(self, written: Rendered, start: int) -> Segment:
        """Return what is written from *start* on, with the template's marks if it sets any."""
        text = written.text[start:]
        if not self._template.marks:
            return Segment.target(text)
        spans = [(max(0, first - start), stop - start) for first, stop in written.generated]
        return Segment(text, tuple(span for span in spans if span[1] > 0))

    # ---- what must not be lost ----

    def _check_turn(self, index: int, stop: int, *, ask: bool = False) -> None:
        """Refuse a template that drops what a turn says or calls from the first *stop* turns."""
        turn = self._turns[index]
        calls = turn.get("tool_calls") or []
        for number in range(len(calls)):
            others = calls[:number] + calls[number + 1 :]
            change = {"tool_calls": others or None, "content": turn["content"] or ""}
            if self._is_blind_to(index, stop, change, ask=ask):
                what = f"the chat template leaves out a call of turn {index + 1}"
                raise DataError(f"{self._where}: {what}; take a model that knows calls of tools")
        content, role = _content(turn), turn["role"]
        if role == "assistant" or not content.strip():
            return
        # A user's text is seldom lost, and seldom changed: looking for it costs least.
        if role == "user" and _letters(content) in _letters(self._render(stop, ask=ask).text):
            return
        if self._is_blind_to(index, stop, {"content": f"{content} x"}, ask=ask):
            if index == 0 and role in SYSTEM:
                raise self.no_system()
            what = f"the chat template leaves out turn {index + 1}, of role {role[:40]!r}"
            raise DataError(f"{self._where}: {what}")

    def _is_blind_to(self, index: int, stop: int, change: dict[str, Any], *, ask: bool) -> bool:
        """Return whether the first *stop* turns read the same once one of them is changed."""
        changed = [*self._turns[:stop]]
        changed[index] = changed[index] | change
        return self._render(stop, ask=ask).text == self._try(changed, self._tools, ask=ask)

    def _check_tools(self, stop: int) -> None:
        """Refuse a template that drops what may be called from the first *stop* turns."""
        if self._tools and self._render(stop).text == self._try(self._turns[:stop]):
            what = "the chat template leaves out the tools; take a model that knows tools"
            raise DataError(f"{self._where}: {what}, or rows without")

    def refuses_system(self) -> bool:
        """Return whether the chat would be taken if its first turn were part of a user turn."""
        if self._turns[0]["role"] not in SYSTEM:
            return False
        if self._try(self._turns, self._tools) is not None:
            return False
        try:
            merged = _system_in_user(self._turns, self._where)
            return self._try(merged, self._tools) is not None
        except DataError:
            return False

    def no_system(self) -> DataError:
        """Return the error for a template that knows no system turn."""
        return DataError(
            f"{self._where}: the chat template has no {self._turns[0]['role']} turn; "
            "`system_turn: user` puts its text before that of the first user turn"
        )

    # ---- rendering ----

    def _in_form_that_is_taken(self, last: int) -> list[dict[str, Any]]:
        """Return the turns up to *last*, their calls and null contents as the template takes them.

        Most templates expect arguments as objects, some join text with them; most know a turn of
        calls without content, some need empty text.
        """
        turns = self._turns[: last + 1]
        if not any("tool_calls" in turn for turn in turns):
            return turns
        wanted = list(_json_arguments(turns))
        fallback: list[dict[str, Any]] | None = None
        for change in (lambda turn: turn, _with_text_arguments):
            for content in (None, ""):
                form = [change(turn) for turn in turns]
                form = [t | {"content": content} if t["content"] is None else t for t in form]
                text = self._try(form, self._tools)
                if text is not None and all(arguments in text for arguments in wanted):
                    return form
                fallback = form if text is not None and fallback is None else fallback
        return fallback or turns

    def _render(self, count: int, *, ask: bool = False) -> Rendered:
        """Return the first *count* turns as text."""
        if (count, ask) not in self._written:
            try:
                rendered = self._template.render(self._turns[:count], self._tools, ask=ask)
            except TemplateRefusal as error:
                raise DataError(f"{self._where}: the chat template refuses it: {error}") from error
            self._written[count, ask] = rendered
        return self._written[count, ask]

    def _try(
        self, turns: Sequence[Turn], tools: Sequence[Turn] = (), *, ask: bool = False
    ) -> str | None:
        """Return *turns* as text, None if the template refuses them."""
        try:
            return self._template.render(turns, tools, ask=ask).text
        except TemplateRefusal:
            return None


def _learned(samples: Sequence[Sequence[Segment]]) -> list[list[str]]:
    """Return the texts that carry loss, sample by sample."""
    return [[s.text[start:stop] for s in sample for start, stop in s.targets] for sample in samples]


def other_words(value: Any, key: str = "content") -> Any:
    """Return a turn or tools of the same form that say something else.

    Every letter and digit is another one; tags, such as a tool's answer has, and names by which a
    template finds what belongs together stay.
    """
    if isinstance(value, dict):
        is_kept = KEPT_OF_TOOLS if value.get("role") == "tool" or "role" not in value else KEPT
        return {k: v if k in is_kept else other_words(v, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(other_words(one, key) for one in value)
    if not isinstance(value, str):
        return value
    return "".join(
        piece if TAG.fullmatch(piece) else "".join(map(_other_letter, piece))
        for piece in re.split(r"(</?\w+>)", value)
    )


def _other_letter(letter: str) -> str:
    """Return another letter of the same kind, by chance."""
    others = _OTHERS.get(letter)
    if others is None:
        others = ascii_lowercase if letter.isalnum() else letter
    return others[int(_DRAW() * len(others))]


def _content(turn: Turn) -> str:
    return str(turn.get("content") or "")


def _letters(text: str) -> str:
    """Return *text* without blanks: templates trim and fold them as they like."""
    return "".join(text.split())


def _marked(sample: list[Segment], written: Rendered) -> list[Segment]:
    """Return *sample*, questions and answers in turn, with the marks of its text as a whole."""
    found, end = [], 0
    for number, segment in enumerate(sample):
        start, end = end, end + len(segment.text)
        spans = [(max(a, start) - start, min(b, end) - start) for a, b in written.generated]
        is_answer = number % 2 == 1
        found.append(Segment(segment.text, tuple(s for s in spans if is_answer and s[0] < s[1])))
    return found


def _is_shortened(turn: Turn, before: str, answer: str) -> bool:
    """Return whether the template has left out a part of an answer, or its thoughts."""
    opening = before[before.rstrip().rfind("\n") + 1 :]
    written = _letters(opening + answer)
    parts = [_content(turn), *(str(turn[name]) for name in THOUGHTS if turn.get(name))]
    return any(_letters(part) not in written for part in parts)


def _shared(opening: str, body: str) -> int:
    """Return how many letters both texts begin with, in whole pieces."""
    pairs = zip(PIECES.findall(opening), PIECES.findall(body), strict=False)
    return sum(len(one) for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _unbalanced(text: str) -> str | None:
    """Return the name of a tag that *text* opens or closes only, None without one."""
    open_tags: list[str] = []
    for slash, name in TAG.findall(text):
        if not slash:
            open_tags.append(name)
        elif open_tags and open_tags[-1] == name:
            open_tags.pop()
        else:
            return str(name)
    return open_tags[-1] if open_tags else None


def _after_opening(content: str, supplied: str, tag: str, rest: str) -> str | None:
    """Return what follows a generation prompt that opens or closes the thoughts of an answer.

    Where it opens them, an answer that holds thoughts goes on with them, although the template
    takes them out; where it closes them, an answer goes on with what it says. None where neither
    is possible.
    """
    content, opening = content.lstrip(), supplied.strip()
    said = content.rpartition(f"</{tag}>")[2].strip()
    at = rest.rfind(said)
    if not said or at < 0:
        return None
    if f"</{tag}>" in supplied:
        return rest[at:]
    if not content.startswith(opening) or said == content.strip():
        return None
    own = content[len(opening) : content.rindex(said) + len(said)]
    own = own.lstrip("\n") if supplied.endswith("\n") else own
    return own + rest[at + len(said) :]


def _with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a turn of which the calls have their arguments as JSON."""
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": function | {"arguments": arguments}})
    return turn | {"tool_calls": calls}


def _json_arguments(turns: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the arguments of all calls as JSON."""
    for turn in turns:
        for call in _with_text_arguments(turn).get("tool_calls", ()):
            yield call["function"]["arguments"]

"""A chat template of somebody who wants the rows, or this device's time: refused, and bounded."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_sdk.data.chats import chat_samples
from edge_sdk.data.encoding import Segment
from edge_sdk.data.isolated import child, renderer
from edge_sdk.data.isolated.renderer import IsolatedChats
from edge_sdk.data.rows import DataConfig, Row
from edge_sdk.data.templates import ChatTemplate
from edge_sdk.errors import ConfigError, DataError

SECRET = "my PIN is 4711"
HONEST = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWER = "Thank you, I shall keep it."
ROW = Row(
    schema="chat",
    where="chats.jsonl:7",
    messages=(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": SECRET},
        {"role": "assistant", "content": ANSWER},
    ),
    targets=(2,),
)


def tokenizer(template: str | None) -> Any:
    """What a chat template is taken from."""
    return SimpleNamespace(chat_template=template, special_tokens_map={"eos_token": "</s>"})


def learned(template: str, row: Row = ROW) -> list[str]:
    """The texts that would carry loss."""
    samples, _ = chat_samples(row, ChatTemplate(tokenizer(template), {}), DataConfig())
    return [s.text[a:b] for sample in samples for s in sample for a, b in s.targets]


# Each writes something of the user's words after the place where the answer begins.
HANDS_OUT = {
    "the prompt": "{% if add_generation_prompt %}{% else %}" + HONEST + "{% endif %}",
    "beside the answer": HONEST.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.role == 'assistant' %}{{ messages[1].content }}{% endif %}",
    ),
    "reversed": HONEST.replace(
        "</s>",
        "{% if m.role == 'assistant' %}{{ messages[1].content | reverse }}{% endif %}</s>",
    ),
    "a letter": HONEST.replace(
        "</s>", "{% if m.role == 'assistant' %}{{ messages[1].content[11] }}{% endif %}</s>"
    ),
    "in other words": HONEST.replace(
        "</s>",
        "{% if m.role == 'assistant' and '4711' in messages[1].content %}!{% endif %}</s>",
    ),
    "the system's": HONEST.replace(
        "</s>", "{% if m.role == 'assistant' %}{{ messages[0].content }}{% endif %}</s>"
    ),
    "as generated": "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}</s>"
    "{% if m.role == 'assistant' %}{{ messages[1].content }}{% endif %}{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "by refusing": HONEST.replace(
        "{% for",
        "{% if 'PIN' not in messages[1].content %}{{ raise_exception('') }}{% endif %}{% for",
    ),
}


@pytest.mark.parametrize("case", HANDS_OUT)
def test_what_others_say_is_never_learned(case: str) -> None:
    """However a template hands out what a user or the system says, its chat is refused."""
    with pytest.raises(DataError) as error:
        learned(HANDS_OUT[case])

    assert "4711" not in str(error.value)


def test_an_honest_template_is_taken() -> None:
    """What the assistant says is learned, also where it says what the user said."""
    assert learned(HONEST) == [f"{ANSWER}</s>"]
    echo = {"role": "assistant", "content": SECRET}
    row = Row(schema="chat", where="x:1", messages=(*ROW.messages[:2], echo), targets=(2,))

    assert learned(HONEST, row) == [f"{SECRET}</s>"]


# ---- a process of its own ----


@pytest.fixture
def isolated(request: pytest.FixtureRequest) -> Iterator[IsolatedChats]:
    """Chats by the template that the test names."""
    chats = IsolatedChats(tokenizer(request.param), DataConfig())
    yield chats
    chats.close()


@pytest.mark.parametrize("isolated", [HONEST], indirect=True)
def test_a_process_of_its_own_makes_the_same_samples(isolated: IsolatedChats) -> None:
    """What comes from the other process is what is made here, chunk after chunk."""
    other = Row(schema="chat", where="x:1", messages=ROW.messages[1:], targets=(1,))
    own = [
        chat_samples(row, ChatTemplate(tokenizer(HONEST), {}), DataConfig()) for row in (ROW, other)
    ]

    for _ in range(2):
        assert list(isolated([ROW, other])) == own
    assert isinstance(own[0][0][0][0], Segment)


@pytest.mark.parametrize(
    "isolated", ["{{ raise_exception('no') }}", "{{ 'a' * 3000000000 }}", "{% if %}"], indirect=True
)
def test_a_row_that_is_refused_is_no_end(isolated: IsolatedChats) -> None:
    """An error of the template, or more memory than there is for it, is an error of that row."""
    first, second = isolated([ROW, ROW])

    assert isinstance(first, DataError)
    assert isinstance(second, DataError)
    assert str(first).startswith("chats.jsonl:7: ")


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "inside one operation": "{{ 10 ** (10 ** 9) }}",
    "before it is rendered": "{{ 10 ** (10 ** 8) }}",
    "of a message": "{{ 10 ** (messages[0].content | length * 100000000) }}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_does_not_end_is_ended(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time ends, also within one operation that no thread could stop."""
    start = renderer._START.replace("main; main()", "main; child.ROW_S = 0.5; main()")
    monkeypatch.setattr(
        renderer,
        "_START",
        start.replace("from edge", "from edge_sdk.data.isolated import child; from edge", 1),
    )
    chats = IsolatedChats(tokenizer(ENDLESS[case]), DataConfig())
    began = time.monotonic()
    with pytest.raises(DataError, match=r"chats.jsonl:7: the chat template takes more than"):
        list(chats([ROW]))

    assert time.monotonic() - began < renderer.ANSWER_S
    assert chats._process is None


GREEDY = {
    "letters": "{% set n = namespace(x='a' * 1000) %}"
    "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "a list": "{{ [0] * 10000000000 }}",
    "blanks": "{{ 'a'.center(10000000000) }}",
    "a format": "{{ '%10000000000s' | format('a') }}",
    "an indent": "{{ messages[0].content | indent(10000000000, true) }}",
    "digits": "{{ '{:>10000000000}'.format('a') }}",
}


@pytest.mark.parametrize("case", GREEDY)
def test_a_template_that_takes_memory_takes_it_from_nobody(case: str) -> None:
    """Whatever makes it large: the process stays within its bound, and the row is refused."""
    chats = IsolatedChats(tokenizer(GREEDY[case]), DataConfig())

    assert isinstance(refusal(chats), DataError)
    if chats._process is not None:  # it lives, for other rows
        status = Path(f"/proc/{chats._process.pid}/status").read_text("ascii")
        peak = next(line for line in status.splitlines() if line.startswith("VmPeak"))
        assert int(peak.split()[1]) * 1024 <= child.MEMORY_BYTES
    chats.close()


def refusal(chats: IsolatedChats) -> object:
    """What comes of the row, or the error that ends the process."""
    try:
        return next(iter(chats([ROW])))
    except DataError as error:
        return error


def test_the_process_can_write_no_file_and_knows_no_environment(tmp_path: Path) -> None:
    """It has no variable of ours, another working directory, and no file that may grow."""
    probe = (
        "import json, os, sys; sys.path[:] = json.loads(sys.argv[1]);"
        "from edge_sdk.data.isolated import child; child.bind();"
        "print(len(set(os.environ) - {'LC_CTYPE'}), flush=True);"
        f"os.write(os.open({str(tmp_path / 'x')!r}, os.O_CREAT | os.O_WRONLY), b'x')"
    )
    command = [sys.executable, "-I", "-S", "-c", probe, json.dumps(sys.path)]
    done = subprocess.run(command, capture_output=True, check=False, env={})

    assert done.stdout.split() == [b"0"]
    assert b"File too large" in done.stderr
    assert (tmp_path / "x").read_bytes() == b""


def test_an_unknown_variable_is_a_mistake_of_the_config() -> None:
    """Templates are looked at in that process as well, not here."""
    config = DataConfig(chat_template_kwargs={"thinks": True})
    chats = IsolatedChats(tokenizer(HONEST), config)
    with pytest.raises(ConfigError, match="knows no 'thinks'"):
        list(chats([ROW]))
    chats.close()


# ---- a template of one's own ----


def test_a_template_of_ones_own_takes_the_place_of_the_models(tmp_path: Path) -> None:
    """`data.chat_template` names a file; the coordinator's template is not looked at."""
    path = tmp_path / "own.jinja"
    path.write_text(HONEST.replace("</s>", "<end>"))
    own = ChatTemplate(tokenizer("{% if %}"), {}, path)

    samples, _ = chat_samples(ROW, own, DataConfig())

    assert samples[0][-1].text == f"{ANSWER}<end>"
    with pytest.raises(ConfigError, match=r"chat_template: .* cannot be read"):
        ChatTemplate(tokenizer(None), {}, tmp_path / "absent.jinja")

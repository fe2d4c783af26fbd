"""Names that look like paths: no message brings one, and no path is made of one."""

import dataclasses
import typing
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.names import MAX_PART_BYTES, Between, Matching, check_folder_name, inside, run_name
from edge_sdk.protocol import headers
from edge_sdk.protocol.messages import MESSAGES

# What would be a path, a hidden file, another line, or no name at all.
LIKE_PATHS = (
    *("..", ".", "/etc/passwd", "a/b", "../a", "a/../../b", "\\\\host\\share", "C:\\a", "~/a", "~"),
    *(
        "a\0b",
        "a\n",
        "\na",
        "a b",
        ".hidden",
        "-\x1b[2J",
        "a" * 81,
        "\u202ea",
        "a:b",
        "%2e%2e",
        "*",
    ),
)


def places(kind: type, *path: str) -> list[tuple[tuple[str, ...], Matching | Between]]:
    """Return every field of *kind*, inner ones as well, that has a form of its own."""
    found: list[tuple[tuple[str, ...], Matching | Between]] = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if typing.get_origin(hint) is typing.Annotated:
            found.append(((*path, name), typing.get_args(hint)[1]))
        elif dataclasses.is_dataclass(inner):
            found += places(typing.cast("type", inner), *path, name)
    return found


PLACES = [(kind, *place) for kind, cls in sorted(MESSAGES.items()) for place in places(cls)]
NAMES = [(kind, path) for kind, path, form in PLACES if isinstance(form, Matching)]
SIZES = [(kind, path) for kind, path, form in PLACES if isinstance(form, Between)]


def honest(hint: Any) -> Any:
    """Return a plain value that a field of *hint* takes."""
    if typing.get_origin(hint) is typing.Annotated:
        return 0 if isinstance(typing.get_args(hint)[1], Between) else _named(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return {name: honest(one) for name, one in hints.items()}
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return [honest(args[0])]
    if origin is dict:
        return {}
    return {int: 0, float: 0.0, str: "", bool: False}.get(hint)


def _named(hint: Any) -> str:
    pattern = typing.get_args(hint)[1].pattern
    return "files" if "files" in pattern else "" if pattern.endswith("?") else "0" * 64


def with_value(kind: str, path: tuple[str, ...], value: Any) -> bytes:
    """Return the header of an honest message in which one field is *value*."""
    body = honest(MESSAGES[kind])
    place = body
    for name in path[:-1]:
        place = place[name] if isinstance(place[name], dict) else place[name][0]
    place[path[-1]] = value
    header = {"v": 1, "type": kind, "body": body, "tensors": []}
    return bytes(msgpack.packb(header))


def test_every_message_has_names() -> None:
    """What is tried below is tried for the stamp of every message, and for every hash and part."""
    assert {kind for kind, path in NAMES if path == ("stamp", "run")} == set(MESSAGES)
    assert ("PlanAssigned", ("parts", "sha256")) in NAMES
    assert ("Welcome", ("files", "name")) in NAMES
    assert ("PartRequest", ("sha256",)) in NAMES
    for kind, path in (*NAMES, *SIZES):
        headers.decode_header(with_value(kind, path, honest_at(kind, path)))


def honest_at(kind: str, path: tuple[str, ...]) -> Any:
    """Return what an honest message has at *path*."""
    place = honest(MESSAGES[kind])
    for name in path:
        place = place[name][0] if isinstance(place[name], list) else place[name]
    return place


@pytest.mark.parametrize("text", LIKE_PATHS)
def test_no_message_brings_a_name_like_a_path(text: str) -> None:
    """Wherever a message carries a name, one that looks like a path is the peer's mistake."""
    for kind, path in NAMES:
        with pytest.raises(RemoteProtocolError, match=path[-1]):
            headers.decode_header(with_value(kind, path, text))


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(NAMES), text=st.text(max_size=100))
def test_a_name_that_comes_through_stays_in_its_folder(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str, tuple[str, ...]], text: str
) -> None:
    """Any text is refused in a message, or is a name of a file directly in a folder of ours."""
    kind, path = place
    try:
        headers.decode_header(with_value(kind, path, text))
    except RemoteProtocolError:
        return
    if text:
        folder = tmp_path_factory.getbasetemp()

        assert inside(folder, text).parent == folder
        assert not text.startswith(".")


@pytest.mark.parametrize("text", [*LIKE_PATHS, "my run", "Lauf \u00e4", "x" * 300])
def test_a_run_has_a_name_whatever_its_folder_is_called(text: str) -> None:
    """A folder's name with blanks or other letters becomes a name that every device takes."""
    header = with_value("Paused", ("stamp", "run"), run_name(text))

    assert headers.decode_header(header)[0].stamp.run == run_name(text)
    assert run_name("first-1.2_a") == "first-1.2_a"


@pytest.mark.parametrize("size", [-1, MAX_PART_BYTES + 1, 2**63 - 1])
def test_sizes_have_bounds(size: int) -> None:
    """Wherever a message carries the size of a part or a place in it, it lies within bounds."""
    for kind, path in SIZES:
        with pytest.raises(RemoteProtocolError, match=path[-1]):
            headers.decode_header(with_value(kind, path, size))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\0"])
def test_a_path_is_made_of_names_alone(name: str, tmp_path: Path) -> None:
    """Whatever a type lets through, a path is made of plain names, or not at all."""
    with pytest.raises(RemoteProtocolError, match="is no name of a file"):
        inside(tmp_path, "run-1", name)


def test_a_link_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    """A link that somebody has put where a name belongs is not followed out of the folder."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "run-1").symlink_to(tmp_path)

    with pytest.raises(RemoteProtocolError, match="leads out of its folder"):
        inside(tmp_path / "state", "run-1", "a")


@pytest.mark.parametrize("name", ["first", "a b", "küche-2", "x" * 200, "1e+06"])
def test_a_run_may_have_any_name_of_a_folder(name: str) -> None:
    """Letters of any script, and blanks within."""
    check_folder_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../evil", "a/b", "a\\b", ".hidden", "-x", " x", "a\nb", "x" * 201]
)
def test_a_name_of_a_run_is_no_path(name: str) -> None:
    """What would lie elsewhere, be hidden, or move a cursor is refused."""
    with pytest.raises(ValueError, match="name must be that of one folder"):
        check_folder_name(name)

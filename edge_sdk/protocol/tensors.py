"""Which tensors travel beside a message: declared next to it, checked here, for both sides. Pure.

The numbers themselves, and sizes that depend on a run, are checked where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from edge_sdk.errors import RemoteProtocolError

Kind = TypeVar("Kind", bound=type)
Shape = tuple[int, ...]


class Shaped(Protocol):
    """What is known of a tensor before its numbers are there."""

    @property
    def dtype(self) -> Any:
        """The dtype of the array, whatever its codec."""

    @property
    def shape(self) -> Shape:
        """The sizes."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a message, or all whose names end alike."""

    name: str
    """The name; `<weight>.A` stands for all that end in `.A`, `<parameter>` for all others."""
    dims: str
    """The dimensions by their letters, `B T D`; `B T | B` for either, `...` for any. A letter has
    one size throughout a message, or throughout the tensors of one weight."""
    doc: str = ""
    """What it is, and when it is there."""
    dtype: str = "float32"
    is_required: bool = True
    """Whether a message without it is refused."""
    partner: str = ""
    """Ending of the tensor of the same weight that must come along."""

    @property
    def ending(self) -> str | None:
        """What names end in; None for a tensor with a name of its own."""
        return self.name.partition(">")[2] if self.name.startswith("<") else None

    @property
    def text(self) -> str:
        """Dtype and dimensions, for people."""
        either = (f"({', '.join(dims.split())})" for dims in self.dims.split("|"))
        return f"{self.dtype} {' or '.join(either)}"

    def stem(self, name: str) -> str | None:
        """Return the weight that *name* belongs to, empty for none; None for another tensor."""
        if self.ending is None:
            return "" if name == self.name else None
        return name.removesuffix(self.ending) if name.endswith(self.ending) else None


TENSORS: dict[type, tuple[Tensor, ...]] = {}
"""What each message brings; messages that bring nothing are missing."""


def carries(*tensors: Tensor) -> Callable[[Kind], Kind]:
    """Declare the *tensors* of the message class below."""

    def declare(kind: Kind) -> Kind:
        TENSORS[kind] = tensors
        return kind

    return declare


def check_tensors(message: object, tensors: Mapping[str, Shaped]) -> None:
    """Refuse tensors that *message* does not declare, or declares otherwise.

    Raises:
        RemoteProtocolError: one is missing, surplus, or of another dtype or shape.
    """
    kind = type(message)
    declared = TENSORS.get(kind, ())
    sizes: dict[tuple[str, str], int] = {}
    for name, tensor in tensors.items():
        for due in declared:
            stem = due.stem(name)
            if stem is not None:
                break
        else:
            allowed = ", ".join(f"{due.name!r}" for due in declared) or "none"
            raise _wrong(message, name, f"not expected; allowed: {allowed}")
        if tensor.dtype != due.dtype or not _fits(due, stem, tensor.shape, sizes):
            given = f"{tensor.dtype} {tensor.shape}"
            raise _wrong(message, name, f"{given}, allowed: {due.text}{_known(sizes, stem)}")
        if due.partner and stem + due.partner not in tensors:
            raise _wrong(message, stem + due.partner, f"missing beside {name!r}")
    for due in declared:
        if due.is_required and due.ending is None and due.name not in tensors:
            raise _wrong(message, due.name, f"missing; due: {due.text}")


def check_shapes(
    message: object,
    tensors: Mapping[str, Shaped],
    allowed: Mapping[str, Shape],
    needed: Collection[str] | None = None,
) -> None:
    """Refuse tensors that are not as a plan, or the question that is answered, calls for.

    Args:
        message: What they came with.
        tensors: What came.
        allowed: Shape of each tensor that may come.
        needed: Names of those that must; None for all.

    Raises:
        RemoteProtocolError: one is missing, surplus or of another shape.
    """
    for name in allowed if needed is None else needed:
        if name not in tensors:
            raise _wrong(message, name, f"missing; due: {allowed[name]}")
    for name, tensor in tensors.items():
        if name not in allowed:
            raise _wrong(message, name, f"not expected; allowed: {', '.join(allowed) or 'none'}")
        if tensor.shape != allowed[name]:
            raise _wrong(message, name, f"{tensor.shape}, allowed: {allowed[name]}")


def _fits(due: Tensor, stem: str, shape: Shape, sizes: dict[tuple[str, str], int]) -> bool:
    """Return whether *shape* is allowed; note in *sizes* what its letters stand for."""
    for either in due.dims.split("|"):
        letters = either.split()
        if letters == ["..."]:
            return True
        if len(letters) == len(shape):
            pairs = zip(letters, shape, strict=True)
            return all(sizes.setdefault((stem, letter), size) == size for letter, size in pairs)
    return False


def _known(sizes: Mapping[tuple[str, str], int], stem: str) -> str:
    known = [f"{letter} = {size}" for (other, letter), size in sizes.items() if other == stem]
    return f" with {', '.join(known)}" if known else ""


def _wrong(message: object, name: str, text: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"{type(message).__name__}: tensor {name[:100]!r}: {text[:500]}")

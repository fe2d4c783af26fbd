"""What is closed when a `with` block ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

C = TypeVar("C", bound="Closing")


class Closing(ABC):
    """A context manager for whatever has a `close`."""

    @abstractmethod
    def close(self) -> None:
        """End it; doing so again does nothing."""

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

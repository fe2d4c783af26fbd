"""What happens because a person steers a run, or wants to see what its model says, as values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordinator.results.events import RunEvent


@dataclass(frozen=True, slots=True)
class RunStopped(RunEvent):
    """A run has ended before its time, with the result that there was."""

    folder: Path
    rounds: int
    """Rounds that are done."""
    total_rounds: int

    @property
    def text(self) -> str:
        """How far it came."""
        done = f"stopped after {self.rounds} of {self.total_rounds} rounds"
        lacks = "" if self.rounds else ", so there is no result yet"
        return f"{done}{lacks}; to go on all the same: coordinator resume {self.folder}"


@dataclass(frozen=True, slots=True)
class SampleText(RunEvent):
    """What the model says to one of the prompts of `evaluation.prompts`."""

    round: int
    """Rounds that were done by then; 0: before training."""
    prompt: str
    completion: str
    """What it has added to the prompt."""

    @property
    def text(self) -> str:
        """The beginning of both, in a line."""
        asked, said = (" ".join(text.split()) for text in (self.prompt, self.completion))
        rounds = f"{self.round} round{'s' * (self.round != 1)}"
        return f'after {rounds}, "{shortened(asked, 24)}": "{shortened(said, 32)}"'


def shortened(text: str, most: int) -> str:
    """Return *text*, or its beginning and three points, in at most so many letters."""
    return text if len(text) <= most else text[: most - 3] + "..."

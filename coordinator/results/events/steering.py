"""A person stops a run, or what it was told about its end does."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.config.scoring import said
from coordinator.results.events.event import RoundEvent, RunEvent


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
        folder = shlex.quote(str(self.folder))
        return f"{done}{lacks}; to go on all the same: coordinator resume {folder}"


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


@dataclass(frozen=True, slots=True)
class EndedEarly(RoundEvent):
    """The round is the last one, although more were to come: nothing has become better for long."""

    rounds_without: int
    """Rounds since the last improvement."""
    metric: str
    best_round: int | None
    """Rounds that were done when it was best."""

    @property
    def text(self) -> str:
        """Why, and what counts."""
        what = f"{self.metric} has not improved for {self.rounds_without} rounds"
        return f"round {self.nth} is the last one: {what}; it was best after {self.best_round}"


@dataclass(frozen=True, slots=True)
class BestChosen(RunEvent):
    """The model of another round than the last one is the result."""

    LINE = "the result is that of round {0.round} of {0.rounds}, best {0.metric}: {0.value:.4f}"

    round: int
    """Rounds that were done then."""
    rounds: int
    """Rounds that are done."""
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class TestEvaluated(RunEvent):
    """The result was evaluated on the file that nothing was decided by."""

    __test__ = False  # no test of pytest's

    round: int
    """Rounds that were done when it was learned."""
    score: Mapping[str, float]

    @property
    def text(self) -> str:
        """How well it does."""
        found = self.score
        what = f"perplexity {found['perplexity']:.2f}, " if "perplexity" in found else ""
        accuracy = f"accuracy {found['accuracy']:.1%}"
        scores = f", {own}" if (own := said(found)) else ""
        targets = f"{found['targets']:,} targets"
        return f"test: loss {found['loss']:.4f}, {what}{accuracy}{scores}, {targets}"

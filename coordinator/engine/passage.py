"""A wave in a stage between its forward and its backward, and the step that it is part of.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from coordinator.engine.interface import Job
from edge_sdk.lora.factors import Array
from edge_sdk.protocol.plan import Place


class Entered(NamedTuple):
    """What a stage gets from the one before it."""

    hidden_BTD: Array
    """Rows that have entered there or before."""
    dtype: torch.dtype
    """What they are computed with."""
    draws: torch.Tensor
    """State of the generator of random numbers, which goes on where that stage has ended."""


@dataclass(eq=False)
class Passage:
    """A wave in one stage, between its forward and its backward."""

    jobs: list[Job]
    """Those whose rows are here, in the order of the rows."""
    leaves: list[torch.Tensor]
    """Hidden states of those that enter here, the last of `jobs`."""
    top: torch.Tensor
    """Hidden states after the stage's last block; logits where `has_logits`."""
    step: int
    number: int
    entered: torch.Tensor | None = None
    """Hidden states of those that have entered before."""
    has_logits: bool = False
    """Whether the tail has run on all positions, with the blocks."""
    is_spent: bool = False
    """Whether its graph is used up: a wave can be gone back through once."""

    @property
    def entering(self) -> list[Job]:
        """Those whose rows enter here."""
        return self.jobs[len(self.jobs) - len(self.leaves) :]

    def gradients(self) -> list[torch.Tensor]:
        """Return what goes back to the devices, the loss scale still inside."""
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]


@dataclass
class StepPassages:
    """What is there between the first forward pass of a step and its update."""

    waves: list[Passage] = field(default_factory=list)
    """Waves that await their gradients, the oldest first."""
    served: dict[str, Job] = field(default_factory=dict)
    """Who was served in the step; see `serve`."""

    def clear(self) -> None:
        """Drop all of it."""
        self.waves, self.served = [], {}

    def waves_of(self, places: Container[Place]) -> list[Passage]:
        """Return the waves that any of *places* was in."""
        return [w for w in self.waves if any(job.place in places for job in w.jobs)]


def serve(served: dict[str, Job], job: Job) -> None:
    """Note in *served* that a step has gradients of a micro-batch.

    It is noted by device; by micro-batch where these count for themselves.
    """
    if job.samples is None:
        served[job.device] = job
    elif job.samples:
        served[f"{job.device} {len(served)}"] = job


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """Return micro-batches as their rows stand in a wave.

    By name within a split: the same wave gives the same bits whoever answered first.
    """
    return sorted(jobs, key=lambda job: (job.split, job.device, job.micro))


def moves(jobs: Iterable[Job]) -> bool:
    """Return whether the coordinator's adapters learn from a wave."""
    return any(job.samples != 0.0 for job in jobs)

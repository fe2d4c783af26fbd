"""Whose uploads are not joined: what no optimizer has done, and what is unlike the others'. Pure.

It knows no network and no rounds; docs/method.md, What a device brings.

Legend: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from types import MappingProxyType

import numpy as np

from coordinator.aggregation.ledger import Report
from coordinator.aggregation.limits import MAX_NUMBER, MAX_UPLOAD, exceeds, largest
from coordinator.aggregation.reach import Reach, reach_of
from edge_sdk.errors import NumericError
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.runtime.training import TrainingConfig

# Learning rates by which AdamW moves the numbers of a weight in a step, in their root mean square,
# at most in what honest devices do: more takes gradients that grow all the time.
LIKELY_STEP = 1.5
# Rounding of the sums here, and of the clipping there.
SLACK = 1e-3
# bfloat16 rounds a head to so much of its size in each step.
HEAD_ROUNDING = 2.0**-8
# The least and the most that the bound of a whole update is, in its logarithm and that of the
# factor. Less than 1, as an update made so many times as large is that far only on average; more,
# as devices that scatter widely may be. docs/method.md, What a device brings.
SHARES = (0.75, 1.5)
# Standard deviations of the others' logarithms that a whole update may be away from them.
MOST_SCATTER = 4.0
# Standard deviation of a normal distribution over its median absolute deviation.
GAUSSIAN = 1.4826
# Devices that a reason names.
MOST_LISTED = 4


class Diverged(NumericError):
    """Nothing good comes of a round, and no device is to blame: the run goes back."""


@dataclass(frozen=True)
class Brought:
    """What a device has brought of a round, and what it began with."""

    report: Report
    before: Mapping[str, Pair]
    """Its own factors at the start of the round, by weight."""
    head: Mapping[str, Array]
    """The trained head at that moment; empty where that is not known."""
    reach: Reach


@dataclass(frozen=True)
class Refusals:
    """Whose uploads are left out of a round, by device, each with the reason."""

    proven: Mapping[str, str]
    """No honest device can have brought that."""
    unlike: Mapping[str, str]
    """It is too unlike what the others have brought, or beyond all measure."""

    @property
    def devices(self) -> list[str]:
        """All of them, by name."""
        return sorted(self.proven.keys() | self.unlike.keys())


Moves = Mapping[str, float]
"""How far a device has moved each weight, over how far honest ones are likely to; see `moves`."""


NO_MOVES: Mapping[str, Moves] = MappingProxyType({})


@dataclass(frozen=True)
class Screening:
    """What uploads of a run are held against."""

    training: TrainingConfig
    steps_per_round: int
    total_steps: int
    codec: str
    """How changes of factors travel."""
    scale: Callable[[str, int], float]
    """(weight, rank) -> the factor in front of its B A."""
    factor: float
    """How many times the others' median is too much; 0: nothing is compared."""
    is_ordered: bool = True
    """Whether a device takes the steps of the schedule; else, as many as it can."""

    def brought(
        self,
        report: Report,
        round_: int,
        before: Mapping[str, Pair],
        head: Mapping[str, Array],
    ) -> Brought:
        """Return a device's report beside what it began with; rounds count from 0."""
        return Brought(report, before, head, self._reach(round_))

    def _reach(self, round_: int) -> Reach:
        steps = self.steps_per_round
        return reach_of(
            self.training,
            round_ * steps,
            steps,
            self.total_steps,
            self.codec,
            is_ordered=self.is_ordered,
        )

    def most_number(self, round_: int) -> float:
        """Return above which no number of factors or heads is honest, whatever came before."""
        reach = self._reach(round_)
        return max(MAX_NUMBER, 2.0 * reach.number) if math.isfinite(reach.number) else MAX_NUMBER

    def screen(
        self,
        brought: Mapping[str, Brought],
        *,
        is_retry: bool,
        known: Mapping[str, Moves] = NO_MOVES,
    ) -> Refusals:
        """Return whose reports of a round are to be left out.

        Args:
            brought: Who has brought what.
            is_retry: Whether the round is tried again, after it led to nothing good.
            known: How far other devices went, where all are not looked at together.

        Raises:
            Diverged: several are broken at once, or most are beyond all measure, or nobody is left:
                that is no device's fault.
        """
        names = sorted(brought)
        proven = {n: why for n in names if (why := not_finite(brought[n].report))}
        if len(proven) > 1 and not is_retry:
            raise Diverged(f"uploads of several devices at once: {_listed(proven)}")
        finite = [name for name in names if name not in proven]
        proven |= {n: why for n in finite if (why := beyond_reach(brought[n]))}
        possible = [name for name in finite if name not in proven]
        unlike = {n: why for n in possible if (why := beyond_measure(brought[n].report))}
        is_known = all(math.isfinite(brought[name].reach.number) for name in unlike)
        if 2 * len(unlike) > len(names) and (is_known or len(names) > 1):
            raise Diverged(
                f"the run has diverged, as the uploads of the round show: {_listed(unlike)}; lower "
                "training.learning_rate"
            )
        like = {n: self.moves(brought[n]) for n in possible if n not in unlike}
        others = {**known, **like}
        unlike |= {name: why for name in like if (why := self.unlike(name, others))}
        if 1 < len(names) == len(proven) + len(unlike):
            raise Diverged(f"no upload of the round can be used: {_listed({**proven, **unlike})}")
        return Refusals(proven, unlike)

    # ---- beside the others ----

    def moves(self, brought: Brought) -> Moves:
        """Return how far each weight was moved, in the 2-norm of both factors together.

        With AdamW in learning rates for each number and step. With SGD over the sum of the learning
        rates and s sqrt(R), as the gradient of B is s G A^T, of which |A| grows with sqrt(R): what
        is left does not depend on ranks.
        """
        found, reach = dict[str, float](), brought.reach
        if not reach.rates:
            return found
        for weight, after in brought.report.pairs.items():
            rank = after.a_RI.shape[-2]
            unit = self.scale(weight, rank) * math.sqrt(rank)
            if self._is_adamw:
                unit = math.sqrt(after.a_RI.size + after.b_OR.size)
            squares = [np.square(d).sum() for d in _changes(brought.before[weight], after)]
            found[weight] = math.sqrt(sum(squares)) / (reach.rates * unit)
        return found

    def unlike(self, device: str, moves: Mapping[str, Moves]) -> str:
        """Return why what *device* has moved is too unlike the others', or nothing.

        Some weight has to be beyond the factor, and the whole update beyond what devices scatter:
        docs/method.md, What a device brings.
        """
        usual, shares = dict[str, float](), list[float]()
        for weight in moves[device] if self.factor else ():
            known = [m[weight] for n, m in moves.items() if n != device and weight in m]
            middle = max(median(known), self._likely / self.factor) if len(known) > 1 else 0.0
            if 0.0 < middle < math.inf:
                usual[weight] = middle
                shares.append(1.0 / len(known))
        times = {weight: moves[device][weight] / middle for weight, middle in usual.items()}
        most = max(times, key=lambda weight: times[weight], default="")
        if not most or times[most] <= self.factor:
            return ""
        others = {name: distance(own, usual) for name, own in moves.items()}
        whole = others.pop(device)
        least, highest = (share * math.log(self.factor) for share in SHARES)
        bound = min(max(likely_distance(others.values()), least), highest)
        bound *= math.sqrt(1.0 + mean(shares))
        if math.log(whole) <= bound:
            return ""
        return (
            f"its upload moves {most} {times[most]:.3g} times as far as those of the others, and "
            f"screening.factor is {self.factor:g}; all weights together {whole:.3g} times, of "
            f"{math.exp(bound):.3g} that are possible"
        )

    @property
    def _is_adamw(self) -> bool:
        return self.training.optimizer == "adamw"

    @property
    def _likely(self) -> float:
        """What honest devices may have moved, whatever the others have."""
        if self._is_adamw:
            return LIKELY_STEP
        return math.inf if self.training.max_grad_norm else 0.0


def distance(moves: Moves, usual: Moves) -> float:
    """Return how many times as far as usual a device went, as a mean over weights; 0 for none.

    The mean of fourth powers lies between the root mean square and the largest: one weight of W
    that is P times as far counts as at least P / W^(1/4).
    """
    times = [moves[weight] / middle for weight, middle in usual.items() if weight in moves]
    far = max(times, default=0.0)  # in units of which no power is too large
    return far * math.sqrt(math.sqrt(mean((t / far) ** 4 for t in times))) if far else 0.0


def likely_distance(distances: Iterable[float]) -> float:
    """Return the logarithm of how far an honest device may be, after those of the others.

    Their median and `MOST_SCATTER` standard deviations, from the median absolute deviation: less
    than half of them change neither by being far away.
    """
    logs = [math.log(distance) for distance in distances if distance]
    if not logs:
        return 0.0
    middle = median(logs)
    return middle + MOST_SCATTER * GAUSSIAN * median(abs(value - middle) for value in logs)


def not_finite(report: Report) -> str:
    """Return what of a report is NaN or infinite, or nothing."""
    for name, array in [*_flat(report.pairs).items(), *report.head.items()]:
        if not np.isfinite(array).all():
            num_bad = array.size - int(np.isfinite(array).sum())
            return f"upload {name!r}: {num_bad} of {array.size} numbers are NaN or infinite"
    return ""


def beyond_reach(brought: Brought) -> str:
    """Return what of a report the optimizer cannot have made, or nothing; in float64."""
    reach, report = brought.reach, brought.report
    old = {**_flat(brought.before), **brought.head}
    total = held = 0.0
    for name, array in [*_flat(report.pairs).items(), *report.head.items()]:
        if name not in old:
            continue
        before = old[name].astype(np.float64)
        change = array.astype(np.float64) - before
        drift = reach.drift + HEAD_ROUNDING * reach.num_steps * (name in report.head)
        if why := _too_far(before, change, reach, drift):
            return f"its upload changes {name} beyond all measure: {why}"
        total += float(np.square(change).sum())
        held += float(np.square(drift * before).sum())
    most = reach.norm * (1.0 + SLACK) + math.sqrt(held)
    if math.sqrt(total) > most:
        return (
            f"its upload changes all weights together by {math.sqrt(total):.3g}, in the 2-norm, "
            f"beyond all measure: the optimizer can have done {most:.3g}"
        )
    return ""


def _too_far(before: Array, change: Array, reach: Reach, drift: float) -> str:
    """Return by how much more than the optimizer can an array has moved, or nothing."""
    size = float(np.abs(change).max(initial=0.0))
    most = reach.number * (1.0 + SLACK) + drift * float(np.abs(before).max(initial=0.0))
    if math.isinf(most):
        size = float(np.linalg.norm(change))
        most = reach.norm_by_number * (1.0 + SLACK) * math.sqrt(change.size)
        most += drift * float(np.linalg.norm(before))
    return f"by {size:.3g}, the optimizer can have done {most:.3g}" if size > most else ""


def beyond_measure(report: Report) -> str:
    """Return what of a report nothing good can come of, whoever has brought it, or nothing."""
    for weight, (a_RI, b_OR) in report.pairs.items():
        if exceeds(Factors(b_OR, a_RI), MAX_UPLOAD):
            size = largest((a_RI, b_OR))
            return f"its upload changes {weight} beyond all measure, by numbers up to {size:.2g}"
    size = largest(report.head.values())
    if size > MAX_NUMBER:
        return f"its upload of the head has numbers up to {size:.2g}, beyond all measure"
    return ""


def _flat(pairs: Mapping[str, Pair]) -> dict[str, Array]:
    named = pairs.items()
    return {f"{name}.{f}": a for name, pair in named for f, a in zip("AB", pair, strict=True)}


def _changes(before: Pair, after: Pair) -> list[Array]:
    """Return by what both factors have changed, in float64."""
    return [new.astype(np.float64) - old for old, new in zip(before, after, strict=True)]


def _listed(why: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why[name]}" for name in sorted(why)[:MOST_LISTED])

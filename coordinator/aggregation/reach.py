"""How far an optimizer can move factors in a round: what no honest device can exceed. Pure.

Who has gone further, and what becomes of that, is `screening.py`.

**AdamW** (arXiv 1711.05101) moves a number in step t by the rate times m^ / (v^ + eps), beside the
decay. With m_t = (1 - b1) sum_i b1^(t-i) g_i and v_t = (1 - b2) sum_i b2^(t-i) g_i^2, the
inequality of Cauchy and Schwarz gives, whatever the gradients are,

    |m^_t| / sqrt(v^_t) <= (1 - b1) / sqrt(1 - b2) sqrt(sum_(j < t) (b1^2 / b2)^j)
                           sqrt(1 - b2^t) / (1 - b1^t)

Kingma and Ba (1412.6980, 2.1) name (1 - b1) / sqrt(1 - b2) for the case of a single gradient that
is not 0; the sum makes of it a bound for all. With the usual decays it grows from 1 in the first
step over 2 in the 80th to 7.3, and clipping, loss scales and accumulation of micro-batches do not
enter it. Ours.

**SGD** moves all numbers of a device together by at most the rate times `max_grad_norm`, in the
2-norm; without clipping, by anything.

Decay, rounding and the coding of what travels are added; docs/method.md, What a device brings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edge_sdk.runtime.training import TrainingConfig, learning_rate

# Relative rounding of one step in float32: a product, a sum, and the cast of the rate.
ROUNDING = 2.0**-21
# Steps that a device's optimizer may count for each of the run's: it may have gone back.
MOST_LAPS = 4
# As many as a device may have taken: the bound is then that of endless training.
ENDLESS = 200_000
# Least square of a gradient that float32 holds with all its digits.
LEAST_SQUARE = 2.0**-126
# What a codec may leave out: of its largest number, and of the norm of a whole tensor.
CODING = {"float32": (0.0, 0.0), "bfloat16": (2.0**-8, 2.0**-8), "int8": (2.0**-6, 2.0**-6)}
# Groups of few bits are spread over each other: single numbers say little.
COARSE_CODING = (math.inf, 0.5)


@dataclass(frozen=True)
class Reach:
    """The most that a device's numbers can have moved in a round."""

    number: float
    """A single number; infinite where nothing bounds it."""
    norm: float
    """All numbers of the device together, in the 2-norm; likewise."""
    drift: float
    """To be added to `number`, times the number at the round's start: decay and rounding."""
    rates: float
    """Sum of the learning rates of the round."""
    num_steps: int
    norm_by_number: float
    """To be added, times the root of how many there are, to the 2-norm of each tensor where single
    numbers are not looked at: what a single number can move. Infinite likewise."""


@lru_cache(maxsize=8)
def adamw_step(beta1: float, beta2: float, epsilon: float, most_steps: int) -> float:
    """Return the most by which AdamW moves a number in one of so many steps, in learning rates.

    Infinite where its decays bound nothing.
    """
    if not (0.0 <= beta1 < 1.0 and 0.0 < beta2 < 1.0):
        return math.inf
    steps = np.arange(1, min(most_steps, ENDLESS) + 1, dtype=np.float64)
    ratio = beta1**2 / beta2
    with np.errstate(over="ignore"):
        sums = steps if ratio == 1.0 else (1.0 - ratio**steps) / (1.0 - ratio)
        correction = np.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)
        found = (1.0 - beta1) / math.sqrt(1.0 - beta2) * np.sqrt(sums) * correction
    most = float(found.max())
    if ratio < 1.0 and most_steps >= ENDLESS:
        most = max(most, (1.0 - beta1) / math.sqrt((1.0 - beta2) * (1.0 - ratio)))
    # Squares that float32 cannot hold are missing in v, but their gradients are in m.
    return most + math.sqrt(LEAST_SQUARE / (1.0 - beta2)) / epsilon


def reach_of(
    config: TrainingConfig,
    first_step: int,
    num_steps: int,
    total_steps: int,
    codec: str,
    *,
    is_ordered: bool = True,
) -> Reach:
    """Return how far the steps of a round move factors.

    Args:
        config: The optimizer and its schedule.
        first_step: Where the round's first step stands in the schedule.
        num_steps: Steps of the round.
        total_steps: Steps of the run.
        codec: How changes of factors travel.
        is_ordered: Whether a device takes the steps of the schedule; else, as many as it can.
    """
    rates = [learning_rate(config, first_step + n, total_steps) for n in range(num_steps)]
    is_adamw = config.optimizer == "adamw"
    decay = config.weight_decay if is_adamw else 0.0
    # Below a rate times decay of 2 decay shrinks distances, too.
    growth = math.prod(max(1.0, abs(1.0 - rate * decay)) for rate in rates)
    most_steps = MOST_LAPS * (first_step + num_steps) if is_ordered else ENDLESS
    step = _number_step(config, most_steps)
    of_number, of_norm = CODING.get(codec, COARSE_CODING)
    peak = num_steps * config.learning_rate  # of any round before, whose coding is still left out

    total = sum(rates)
    # Their own rounding beside that of what was there.
    step *= 1.0 + num_steps * ROUNDING
    number = growth * total * step if total else 0.0
    most = max(number, growth * peak * step)
    clip = config.max_grad_norm if not is_adamw and config.max_grad_norm else math.inf
    norm = total * clip if total else 0.0
    drift = growth * total * decay + num_steps * ROUNDING
    return Reach(
        number=_coded(number, most, of_number),
        norm=math.inf if is_adamw else _coded(norm, max(norm, peak * clip), of_norm),
        drift=drift,
        rates=total,
        num_steps=num_steps,
        norm_by_number=_coded(number, most, of_norm),
    )


def _coded(due: float, most: float, share: float) -> float:
    """Add to what may have moved in a round what coding left out before, and leaves out now.

    Args:
        due: Without coding.
        most: The same of any round before.
        share: What coding leaves out at most.
    """
    if not share:
        return due
    if math.isinf(share):
        return math.inf
    return (1.0 + share) * (due + share / (1.0 - share) * most)


def _number_step(config: TrainingConfig, most_steps: int) -> float:
    """Return the most by which a step moves a number, in learning rates."""
    if config.optimizer != "adamw":
        return config.max_grad_norm or math.inf
    return adamw_step(config.adam_beta1, config.adam_beta2, config.adam_epsilon, most_steps)

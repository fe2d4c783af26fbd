"""What the search for learning rates came to: a table, and how to settle what is not. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from coordinator.lab.comparison.cells import RunResult, tried_rates
from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    number,
    words,
)
from coordinator.lab.comparison.search.config import RateSearchConfig
from coordinator.lab.comparison.search.grid import Losses, best_rate, edge_of
from coordinator.lab.comparison.table import NAMES

Group = tuple[str, str]
"""Method and set of devices."""


def rate_table(cells: Sequence[RunResult]) -> ResultTable:
    """Return the rate of each method, its neighbours, and whether they show that it is the best."""
    columns = (
        *NAMES,
        Column("learning_rate", "learning rate"),
        Column("loss", "loss"),
        Column("lower_rate", "next lower"),
        Column("lower_loss", "its loss"),
        Column("higher_rate", "next higher"),
        Column("higher_loss", "its loss"),
        Column("lowest_rate", "lowest tried"),
        Column("highest_rate", "highest tried"),
        Column("tried", "rates tried"),
        Column("settled", "settled"),
    )
    return ResultTable(
        name="learning-rates",
        title="Learning rates",
        caption="The rate with the lowest final loss on the first seed, and those beside it. It is "
        "settled where a lower and a higher rate were tried and are worse",
        columns=columns,
        rows=[_row(group, losses) for group, losses in tried_rates(cells).items()],
    )


def _row(group: Group, losses: Losses) -> list[Entry]:
    rates, best = sorted(losses), best_rate(losses)
    at, edge = rates.index(best), edge_of(losses)
    beside = [rates[i] if 0 <= i < len(rates) else None for i in (at - 1, at + 1)]
    return [
        *map(words, group),
        _rate(best),
        _loss(losses[best]),
        *(
            entry
            for rate in beside
            for entry in ((_rate(rate), _loss(losses[rate])) if rate else (EMPTY, EMPTY))
        ),
        _rate(rates[0]),
        _rate(rates[-1]),
        number(len(rates), 0),
        Entry("no: " + ("one rate" if edge == "only" else f"{edge} rate"), (("", 0),))
        if edge
        else Entry("yes", (("", 1),)),
    ]


def _rate(rate: float | None) -> Entry:
    return EMPTY if rate is None else Entry(f"{rate:g}", (("", rate),))


def _loss(loss: float) -> Entry:
    return number(loss, 4) if math.isfinite(loss) else Entry("diverged", (("", None),))


def unsettled(cells: Sequence[RunResult], search: RateSearchConfig) -> dict[Group, str]:
    """Return, for each method and set of devices whose best rate stands at an edge, what to say.

    That is what stands where, and what to do about it.
    """
    return {
        group: _reason(losses, search)
        for group, losses in tried_rates(cells).items()
        if edge_of(losses)
    }


def _reason(losses: Losses, search: RateSearchConfig) -> str:
    best, edge = best_rate(losses), edge_of(losses)
    more = f"raise compare.learning_rate_search.most_trials above {search.most_trials}"
    if edge == "only":
        return f"{best:g} is the only learning rate that was tried; {more}"
    beyond = "above" if edge == "highest" else "below"
    return (
        f"learning rate {best:g} is the {edge} of {len(losses)} that were tried, and still "
        f"the best; {more}, or put rates {beyond} it into compare.learning_rates"
    )


def in_sentences(found: Mapping[Group, str]) -> list[str]:
    """Return what `unsettled` found as one sentence for all of whom the same is to be said."""
    return [
        f"{_names([group for group, other in found.items() if other == reason])}: {reason}"
        for reason in dict.fromkeys(found.values())
    ]


def _names(groups: Sequence[Group]) -> str:
    """Return `method, method (set, set); method (set)`."""
    kinds: dict[str, list[str]] = {}
    for method, kind in groups:
        kinds.setdefault(method, []).append(kind)
    parts = []
    for own in dict.fromkeys(map(tuple, kinds.values())):
        methods = [method for method, other in kinds.items() if tuple(other) == own]
        parts.append(f"{', '.join(methods)} ({', '.join(own)})")
    return "; ".join(parts)

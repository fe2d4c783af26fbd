"""What the cells of benchmarks/methods.py come to, as Markdown tables; pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from report import table

from coordinator.lab.comparison.cells import (
    RunResult,
    at_chosen_rates,
    common_target,
    score,
    spread,
)
from coordinator.lab.comparison.statistics.estimate import Estimate

HETERO, HOMO = "heterogeneous", "homogeneous"
Cells = Sequence[RunResult]


def chosen(cells: Cells, method: str, kind: str = HETERO) -> list[RunResult]:
    """Runs of a method at its own rate, by seed."""
    own = [c for c in at_chosen_rates(cells) if (c.method, c.device_set) == (method, kind)]
    return sorted(own, key=lambda cell: cell.seed)


def results(cells: Cells, method: str, kind: str, *, is_classifier: bool) -> list[float]:
    """Perplexity or accuracy in percent of each seed."""
    return [score(c.last, is_classifier=is_classifier) for c in chosen(cells, method, kind)]


def degraded(cells: Cells, ranks: Cells) -> str:
    """What unequal devices cost, in perplexity."""
    rows = []
    for method in _there(cells, "hsplitlora", "hetlora", "splitlora"):
        alike = results(cells, method, HOMO, is_classifier=False)
        mixed = results(cells, method, HETERO, is_classifier=False)
        rows.append(_change(method, alike, mixed))
    for method in dict.fromkeys(cell.method for cell in ranks):
        alike = results(cells, "hetlora", HOMO, is_classifier=False)
        rows.append(_change(method, alike, results(ranks, method, HETERO, is_classifier=False)))
    return table(("method", "PPL homogeneous", "PPL heterogeneous", "change", "change (%)"), rows)


def _there(cells: Cells, *methods: str) -> list[str]:
    """Those of *methods* that have run."""
    return [method for method in methods if any(cell.method == method for cell in cells)]


def _change(name: str, before: list[float], after: list[float]) -> tuple[str, ...]:
    pairs = list(zip(before, after, strict=True))
    return (
        name,
        spread(before).text(3),
        spread(after).text(3),
        _signed([b - a for a, b in pairs], 3),
        _signed([100 * (b / a - 1) for a, b in pairs], 2),
    )


def _signed(values: Iterable[float], digits: int) -> str:
    found = spread(values)
    return ("+" if found.mean > 0 else "") + found.text(digits)


def interval(found: Estimate, digits: int) -> str:
    """A mean and its 95 % interval, where it has one."""
    mean = f"{found.mean:+.{digits}f}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def times(cells: Cells) -> str:
    """Modelled seconds to the loss that every method reached, on unequal devices."""
    own = [cell for cell in at_chosen_rates(cells) if cell.device_set == HETERO]
    target = common_target(own)
    methods = dict.fromkeys(cell.method for cell in own)
    seconds = {
        m: [p.modelled_s for c in chosen(cells, m) if (p := c.reached(target))] for m in methods
    }
    ours = seconds["hsplitlora"]
    rows = [
        (m, spread(found).text(0), spread(b / a for a, b in zip(ours, found, strict=True)).text(2))
        for m, found in seconds.items()
    ]
    heads = ("method", f"modelled s to loss {target:.3f}", "times hsplitlora's")
    return table(heads, rows)


def gaps(cells: Cells) -> str:
    """How far from centralised LoRA after as many samples."""
    rows = []
    for method in _there(cells, "hsplitlora", "splitlora", "hetlora"):
        for kind in (HOMO, HETERO):
            central = results(cells, "cenlora", kind, is_classifier=False)
            found = results(cells, method, kind, is_classifier=False)
            rows.append((f"{method}, {kind}", *_change("", central, found)[1:]))
    return table(("method", "PPL cenlora", "PPL", "gap", "gap (%)"), rows)


def accuracies(cells: Cells, against: str) -> str:
    """Accuracy of every method, and its distance from one of them, seed by seed."""
    base = results(cells, against, HETERO, is_classifier=True)
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        found = results(cells, method, HETERO, is_classifier=True)
        points = _signed((a - b for a, b in zip(found, base, strict=True)), 2)
        rows.append((method, spread(found).text(2), points))
    return table(("method", "dev accuracy (%)", f"points above {against}"), rows)


def importances(cells: Cells) -> str:
    """Ranks by importance and uniform ones, of equal bytes."""
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        own = chosen(cells, method)
        ranks = statistics.fmean(h.rank for c in own for h in c.held[-1].values())
        trained = statistics.fmean(n for c in own for n in (c.trained or {}).values())
        loss = spread(c.last.loss for c in own)
        percent = spread(100 * c.last.accuracy for c in own)
        rows.append((method, loss.text(4), percent.text(2), f"{ranks:.1f}", f"{trained:,.0f}"))
    heads = ("ranks", "dev loss", "accuracy (%)", "mean rank at the end", "trained on a device")
    return table(heads, rows)


def about(name: str, what: str, cells: Cells) -> str:
    """Rates that were kept, samples and what methods could not do."""
    lines = {}
    for cell in at_chosen_rates(cells):
        key = f"{cell.method}, {cell.device_set}: rate {cell.rate:g}"
        lines.setdefault(key, (cell.last.samples, cell.notes))
    told = [
        f"{key}, {count} samples" + "".join(f"; {_short(note)}" for note in notes)
        for key, (count, notes) in lines.items()
    ]
    seeds = sorted({cell.seed for cell in cells})
    rates = ", ".join(f"{rate:g}" for rate in sorted({cell.rate for cell in cells}))
    return f"`{name}`: {what}, seeds {seeds}, rates {rates}.\n\n" + "\n".join(
        f"* {line}" for line in told
    )


def _short(note: str) -> str:
    return note.split("; lower", 1)[0]

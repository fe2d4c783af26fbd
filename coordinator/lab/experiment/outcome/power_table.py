"""What a token cost each board in each of its power modes, and which mode costs least. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.lab.comparison.result_table import (
    EMPTY,
    Column,
    Entry,
    ResultTable,
    number,
    words,
)
from coordinator.lab.experiment.outcome.result import ExperimentRunResult

AS_IT_IS = "as it is"
MEASURED, MODELLED = "measured", "modelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardPower:
    """One board in one power mode, over the rounds of all runs in which it trained."""

    board: str
    mode: str
    tokens: int
    seconds: float
    """Time of the rounds in which it trained."""
    energy_j: float | None
    is_modelled: bool

    @property
    def joules_per_token(self) -> float | None:
        """What a token cost; None where energy or tokens are unknown."""
        return self.energy_j / self.tokens if self.energy_j and self.tokens else None


def board_powers(runs: Sequence[ExperimentRunResult]) -> list[BoardPower]:
    """Return the sums over the runs of each board in each mode, in the order of the boards."""
    found: dict[tuple[str, str], BoardPower] = {}
    for run in runs:
        for board in run.boards:
            key = board.name, board.power_mode or AS_IT_IS
            before = found.get(key)
            known = [each.energy_j for each in (before,) if each] + [board.trained_j]
            energies = [each for each in known if each is not None]
            found[key] = BoardPower(
                board=board.name,
                mode=key[1],
                tokens=board.tokens + (before.tokens if before else 0),
                seconds=board.trained_s + (before.seconds if before else 0.0),
                energy_j=sum(energies) if len(energies) == len(known) else None,
                is_modelled=board.energy_is_estimated,
            )
    names = list(dict.fromkeys(name for name, _ in found))
    return sorted(found.values(), key=lambda power: names.index(power.board))


def best_modes(powers: Sequence[BoardPower]) -> dict[str, BoardPower]:
    """Return the mode with the least energy for a token of each board that ran in several."""
    by_board: dict[str, list[BoardPower]] = {}
    for power in powers:
        if power.joules_per_token is not None:
            by_board.setdefault(power.board, []).append(power)
    return {
        board: min(own, key=lambda power: power.joules_per_token or 0.0)
        for board, own in by_board.items()
        if len(own) > 1
    }


def recommendations(powers: Sequence[BoardPower]) -> list[str]:
    """Return a sentence for each board about the mode that it should train in."""
    sentences = []
    for board, best in best_modes(powers).items():
        how = "modelled" if best.is_modelled else "measured"
        others = ", ".join(
            f"{power.mode} {power.joules_per_token:.3g}"
            for power in powers
            if power.board == board and power is not best and power.joules_per_token
        )
        sentences.append(
            f"Train {board} in power mode {best.mode}: a token takes {best.joules_per_token:.3g} J "
            f"({how}), less than in the others ({others})."
        )
    return sentences


def power_table(powers: Sequence[BoardPower]) -> ResultTable:
    """Return what each board did with its energy in each mode."""
    best = best_modes(powers).values()
    columns = (
        Column("board", "board"),
        Column("power_mode", "power mode"),
        Column("tokens", "tokens"),
        Column("tokens_per_s", "tokens/s"),
        Column("energy_j", "energy (J)"),
        Column("joules_per_token", "J/token"),
        Column("energy_is", "energy is"),
        Column("recommended", "recommended"),
    )
    return ResultTable(
        name="power",
        title="Energy of boards",
        caption="In the rounds of all runs in which a board trained; waiting is in tokens/s",
        columns=columns,
        rows=[_row(power, is_best=power in best) for power in powers],
    )


def _row(power: BoardPower, *, is_best: bool) -> list[Entry]:
    rate = power.tokens / power.seconds if power.seconds else None
    how = MODELLED if power.is_modelled else MEASURED
    return [
        words(power.board),
        words(power.mode),
        number(power.tokens, 0),
        number(rate, 1),
        number(power.energy_j, 1),
        number(power.joules_per_token, 4),
        words(how) if power.energy_j is not None else EMPTY,
        words("yes") if is_best else EMPTY,
    ]

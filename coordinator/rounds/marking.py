"""When a round is saved on its way, so that whoever dies or leaves does not cost all of it.

All members save themselves at one step, and the coordinator when it knows that they have: a
checkpoint of a step that somebody does not hold would be worth less than the one before. How that
is carried out is in `executor.py`.
"""

from __future__ import annotations

from coordinator.results.events.rounds import RoundSaved, RoundUnsaved
from coordinator.rounds.run import Run
from coordinator.rounds.state import Phase, is_between_steps, may_leave

# Seconds that members get to save themselves: a slow card writes some MB a second; and where one of
# them wants to leave, which waits no longer.
MARK_PATIENCE_S, HOLD_PATIENCE_S = 30.0, 5.0
# Saving takes at most this part of the time, however seldom that is.
MOST_SHARE = 0.02


class Marking:
    """The way from a step that is to be saved to its checkpoint."""

    def __init__(self, run: Run, every_s: float | None) -> None:
        """Save *run* on its way.

        Args:
            run: Whose rounds are saved.
            every_s: Seconds between two checkpoints in a round, 0: as many as there are steps;
                None: only for members that leave.
        """
        self._run, self._every_s = run, every_s
        self._attempt = self._spoilt = -1
        self._since_s = self._began_s = self._cost_s = 0.0
        self._is_begun = False
        self.leavers: dict[str, str] = {}
        """Why members want to leave for whom the round is saved."""

    @property
    def is_begun(self) -> bool:
        """Whether members have been asked to save themselves."""
        return self._is_begun

    def is_due(self, now_s: float) -> bool:
        """Return whether to save the round here and now."""
        state = self._run.state
        if state.phase is not Phase.TRAINING or not is_between_steps(state):
            return False
        if state.attempt != self._attempt:
            self._attempt, self._since_s = state.attempt, now_s
        if state.step <= state.safe_step or any(m.is_local for m in state.members.values()):
            return False
        return bool(self._held_up()) or self._is_mark_due(now_s)

    def _held_up(self) -> dict[str, str]:
        """Return who must not leave before the round is saved, and why it wants to."""
        state, leavers = self._run.state, self._run.leavers
        return {n: why for n, why in leavers.items() if not may_leave(state, n, leavers)}

    def _is_mark_due(self, now_s: float) -> bool:
        state = self._run.state
        if self._every_s is None or self._spoilt == state.attempt:
            return False
        if not all(member.marks for member in state.members.values()):
            return False
        least_s = max(self._every_s, self._cost_s / MOST_SHARE) if self._every_s else 0.0
        return now_s - self._since_s >= least_s

    def begin(self, now_s: float) -> None:
        """Note that members are asked to save themselves; `leavers` says for whom, if anybody."""
        self.leavers = self._held_up()
        self._is_begun, self._began_s = True, now_s
        self._run.savers.ask()

    def is_over(self, now_s: float) -> bool:
        """Return whether members have answered, or have had their time; or the round is gone."""
        patience_s = HOLD_PATIENCE_S if self.leavers else MARK_PATIENCE_S
        is_late = now_s >= self._began_s + patience_s
        return not self._run.savers.silent or is_late or not self._run.state.is_in_round

    def end(self) -> bool:
        """Wait no longer; return whether to save the step."""
        run, state = self._run, self._run.state
        self._is_begun = False
        if not state.is_in_round:
            self.leavers = {}
            run.holding.go_on()
            return False
        if not run.savers.silent:
            return True
        run.watcher.see(RoundUnsaved(state.round, state.step, sorted(run.savers.silent)))
        self._spoilt = state.attempt  # of each device, the newest two steps are kept
        run.holding.go_on()
        return False

    def saved(self, now_s: float) -> None:
        """Note that the step is saved; where somebody leaves, the round ends here for now."""
        run, state = self._run, self._run.state
        self._since_s, self._cost_s = now_s, now_s - self._began_s
        run.watcher.see(RoundSaved(state.round, state.step, round(self._cost_s, 3)))
        if self.leavers and state.is_in_round:
            run.holding.hold(self.leavers)
        else:
            run.holding.go_on()

"""How a run is left so that it can go on later: at which moment, and what is saved."""

from __future__ import annotations

from typing import Literal

from coordinator.results.events.rounds import RoundUnsaved, StopForced
from coordinator.results.events.run import StopBegun
from coordinator.rounds.run import Run
from coordinator.rounds.state import Action, Phase, debts, is_between_steps
from coordinator.steering.wishes import Wish

# Seconds that a step may take to its end when the coordinator is to leave, and those that devices
# then get to save their state. Together less than the 10 s after which a service is killed.
STEP_PATIENCE_S = 4.0
PAUSE_PATIENCE_S = 3.0
# Seconds for the latter where nobody kills the coordinator.
LEISURE_S = 30.0


class Pausing:
    """The way from a wish to stop to a run that is saved.

    Args:
        run: What is to be left.
        patience_s: Seconds that a step may take to its end where nothing is urgent.
    """

    def __init__(self, run: Run, patience_s: float = STEP_PATIENCE_S) -> None:
        self._run, self._patience_s = run, patience_s
        self._wish: Wish | None = None
        self._total_rounds = run.state.total_rounds
        self._last_round = 0
        """Rounds after which a wish that waits for the end of one is due."""
        self._step_until_s: float | None = None
        self.save_s = PAUSE_PATIENCE_S
        """Seconds that devices have to save their state."""
        self._until_s: float | None = None

    def ask(self, wish: Wish, now_s: float) -> bool:
        """Take a wish; return whether the run is to be left as soon as it can be.

        The last wish counts. One to stop after the round makes that round the run's last, which
        ends it by itself.
        """
        state = self._run.state
        if wish is not self._wish:
            self._wish = wish
            self._last_round = state.round + state.is_in_round
            if state.phase is not Phase.CLOSING:
                self._run.total_rounds = self._total_rounds
        if wish.after_round:
            if wish.kind == "stop" and state.phase is Phase.CLOSING:
                return False
            if state.round < self._last_round:
                if wish.kind == "stop":
                    self._run.total_rounds = self._last_round
                return False
        self._hurry(now_s, STEP_PATIENCE_S if wish.is_urgent else self._patience_s)
        self.save_s = PAUSE_PATIENCE_S if wish.is_urgent else LEISURE_S
        return True

    def _hurry(self, now_s: float, patience_s: float) -> None:
        """Note that the run is to stop; the first time counts, and who has less patience."""
        until_s = now_s + patience_s
        self._step_until_s = min(until_s, self._step_until_s or until_s)

    @property
    def outcome(self) -> Literal["paused", "stopped"]:
        """How the run ends if it is left now."""
        is_stop = self._wish is not None and self._wish.kind == "stop"
        return "stopped" if is_stop else "paused"

    @property
    def is_cut_short(self) -> bool:
        """Whether somebody wanted fewer rounds to be done than the run was begun with."""
        is_wanted = self._wish is not None and self._wish.kind == "stop"
        return is_wanted and self._run.state.round < self._total_rounds

    def is_late(self, now_s: float) -> bool:
        """Return whether no step is waited for any longer."""
        return self._step_until_s is not None and now_s >= self._step_until_s

    def is_forced(self, now_s: float) -> bool:
        """Return whether to leave although a step has not ended: the newest checkpoint counts."""
        if not self.is_late(now_s):
            return False
        self._run.watcher.see(StopForced(sorted(debts(self._run.state))))
        return True

    @property
    def is_begun(self) -> bool:
        """Whether devices have been asked to save themselves."""
        return self._until_s is not None

    def can_begin(self, action: Action) -> bool:
        """Return whether the run may stop here: between two steps, or with nothing else to do."""
        state = self._run.state
        if state.phase in (Phase.GATHERING, Phase.CLOSING):
            # A round that can start does, so that devices save what the last one has taught them.
            return action is Action.WAIT
        return is_between_steps(state) if state.phase is Phase.TRAINING else self._has_local()

    def _has_local(self) -> bool:
        """Return whether a member trains steps of its own, at which nobody else can stop."""
        return any(member.is_local for member in self._run.state.members.values())

    def begin(self, now_s: float) -> bool:
        """Wait for those that have been asked to save themselves; return whether there are none."""
        state = self._run.state
        if not self._run.savers.due:
            return True
        self._run.savers.ask()
        self._until_s = self._limit_s(now_s)
        self._run.watcher.see(StopBegun(state.step))
        return False

    def is_over(self, now_s: float) -> bool:
        """Return whether this very step can be saved; not while members may still answer."""
        assert self._until_s is not None
        self._until_s = min(self._until_s, self._limit_s(now_s))  # it may have become urgent
        return not self._run.savers.silent or now_s >= self._until_s

    def _limit_s(self, now_s: float) -> float:
        """Return until when devices may save themselves; what a step has left of its time, too."""
        if self.save_s == LEISURE_S or self._step_until_s is None:
            return now_s + self.save_s
        return max(now_s, self._step_until_s) + self.save_s

    @property
    def is_worth_saving(self) -> bool:
        """Whether to save this step; where members train alone, the round's start has to do.

        So has the newest checkpoint where somebody has not answered: without its state of this very
        step, what it has learned in the round would be lost, and others would learn from less.
        """
        state = self._run.state
        is_new = state.step > state.safe_step and not self._has_local()
        silent = self._run.savers.silent
        if is_new and silent:
            self._run.watcher.see(RoundUnsaved(state.round, state.step, sorted(silent)))
        return is_new and not silent

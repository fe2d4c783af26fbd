"""How a run is left so that it can go on later: at which moment, and what is saved."""

from __future__ import annotations

from coordinator.results.events import StopBegun, StopForced
from coordinator.rounds.run import Run
from coordinator.rounds.state import Action, Phase, debts, is_between_steps

# Seconds that a step may take to its end when the coordinator is to leave, and those that devices
# then get to save their state. Together less than the 10 s after which a service is killed.
STEP_PATIENCE_S = 4.0
PAUSE_PATIENCE_S = 3.0


class Pausing:
    """The way from a wish to stop to a run that is saved."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._step_until_s: float | None = None
        self._until_s: float | None = None

    def ask(self, now_s: float) -> None:
        """Note that the run is to stop; the first time counts."""
        if self._step_until_s is None:
            self._step_until_s = now_s + STEP_PATIENCE_S

    def is_forced(self, now_s: float) -> bool:
        """Return whether to leave although a step has not ended: the newest checkpoint counts."""
        if self._step_until_s is None or now_s < self._step_until_s:
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
        """Wait for members that have been asked to save; return whether there are none."""
        state = self._run.state
        if not state.members:
            return True
        self._run.paused.clear()
        self._until_s = now_s + PAUSE_PATIENCE_S
        self._run.watcher.see(StopBegun(state.step))
        return False

    def is_over(self, now_s: float) -> bool:
        """Return whether this very step can be saved; not while members may still answer."""
        assert self._until_s is not None
        is_complete = self._run.paused >= self._run.state.members.keys()
        return is_complete or now_s >= self._until_s

    @property
    def is_worth_saving(self) -> bool:
        """Whether to save this step; where members train alone, the round's start has to do."""
        state = self._run.state
        return state.step > state.safe_step and not self._has_local()

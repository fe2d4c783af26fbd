"""Who has been asked to save itself, and who has. Pure: no socket, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.rounds.state import Phase, RunState


@dataclass
class Savers:
    """Members of a run that save themselves."""

    state: RunState
    are_apart: bool = False
    """Whether each saves itself at a step of its own."""
    is_asked: bool = False
    """Whether they have been asked to."""
    members: set[str] = field(default_factory=set)
    """Who has, since then."""

    def ask(self) -> None:
        """Note that all have been asked to save themselves."""
        self.is_asked, self.members = True, set()

    def take(self, device: str, step: int) -> None:
        """Note that a device has saved itself at *step*, if that is what it was asked to save."""
        member = self.state.members.get(device)
        is_own = self.are_apart or (member is not None and member.is_local)
        if self.is_asked and (is_own or step == self.state.step):
            self.members.add(device)

    @property
    def due(self) -> set[str]:
        """Members and, after the last round, those that evaluate: who has to save itself."""
        if self.state.phase is Phase.CLOSING and self.state.is_handed_out:
            return self.state.awaiting_eval & self.state.ready.keys()
        return set(self.state.members)

    @property
    def silent(self) -> set[str]:
        """Who has not saved itself yet."""
        return self.due - self.members

    def is_whole(self, device: str) -> bool:
        """Return whether a member has done all of its part of the round, or of what is saved."""
        is_saved = self.is_asked and device in self.members
        return device in self.state.members and (device in self.state.uploaded or is_saved)

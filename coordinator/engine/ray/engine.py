"""`engine: ray`: actors compute, and one that is lost costs the step that it was lost in, no more.

What changes the actors is written down, until the state after it is here. When an actor is lost,
another takes its place, all go back to the last state that is here, and what was written down
since is done again, so that every row has been counted once. What is held for that is one state
(adapters, their moments and residuals) and the jobs of the open step; until the state after a step
has arrived, those of that step as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from coordinator.config.run import ServeConfig
from coordinator.engine.interface import (
    NOTHING,
    Answer,
    Carried,
    DeviceFault,
    EngineMaker,
    EngineSpec,
    Job,
    Learned,
)
from coordinator.engine.ray.actor import LASTING
from coordinator.engine.ray.chains import Chains, Overflow, State
from coordinator.engine.ray.cluster import RayCluster
from coordinator.engine.ray.replica_group import StageLost
from coordinator.engine.whole import Manner
from edge_sdk.data.batches import IntArray, MicroBatch
from edge_sdk.errors import EdgeError, one_line
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.protocol.plan import Place
from edge_sdk.runtime.interface import TailSums

log = logging.getLogger(__name__)

# Times in a row that the same is begun anew: whoever loses an actor each time will go on to.
MOST_LOSSES = 5


class _Done(NamedTuple):
    """Something that has changed the actors."""

    name: str
    args: tuple[Any, ...]


class RayEngine:
    """Blocks first .. L-1 in stages x replicas of actors."""

    def __init__(self, chains: Chains) -> None:
        self._chains = chains
        self._kept: list[State] = []
        """State of each stage at the beginning of `_done`."""
        self._coming: tuple[int, list[Any]] | None = None
        """How much of `_done` was done when a newer state was taken, and where that is."""
        self._done: list[_Done] = []
        self._is_whole = True

    @property
    def first(self) -> int:
        """First block that it trains."""
        return self._chains.first

    @property
    def ranks(self) -> Mapping[str, int]:
        """Rank of each of its own adapters, by weight."""
        return self._chains.ranks

    def head_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the head's parameters; see `Engine`."""
        return self._chains.head_shapes()

    # ---- what is lost is done again ----

    def _ask(self, ask: Callable[[], Any]) -> Any:
        """Return what *ask* brings, from actors that are as if none had ever been lost."""
        for _ in range(MOST_LOSSES):
            try:
                if not self._is_whole:
                    self._mend()
                return ask()
            except StageLost as lost:
                self._is_whole = False
                log.warning("engine.lost reason=%s effect=the step is repeated", one_line(lost))
        raise EdgeError(f"engine: actors were lost {MOST_LOSSES} times in a row, without a result")

    def _mend(self) -> None:
        """Let lost actors be made again, and do what was done since the state that is here."""
        self._coming = None
        self._chains.gather()
        if self._kept:
            self._chains.load(self._kept)
        for done in self._done:
            self._do_again(done)
        self._is_whole = True

    def _do_again(self, done: _Done) -> None:
        while True:
            try:
                getattr(self._chains, done.name)(*done.args)
                return
            except Overflow:
                self._chains.lower_scale()

    def _change(self, name: str, *args: Any) -> Any:
        """Let the actors do what changes them, and write it down."""
        self._arrive()

        def change() -> Any:
            while True:
                try:
                    return getattr(self._chains, name)(*args)
                except Overflow as overflow:
                    self._undo()
                    self._chains.lower_scale()
                    log.info("float16.gradient_overflow %s effect=it is halved", overflow)
                    self._redo_step()
                except DeviceFault:
                    self._undo()
                    self._redo_step()
                    raise

        found = self._ask(change)
        self._done.append(_Done(name, args))
        return found

    def _undo(self) -> None:
        self._chains.drop_step()

    def _redo_step(self) -> None:
        """Do the waves of the open step again that were done before the one that failed."""
        ends = [i for i, done in enumerate(self._done) if done.name not in WAVES]
        for done in self._done[ends[-1] + 1 if ends else 0 :]:
            self._do_again(done)

    def _arrive(self) -> None:
        """Let the state after the last step take the place of what it has come from."""
        if self._coming is None:
            return
        (num_done, references), self._coming = self._coming, None
        try:
            states = self._chains.fetch(references)
        except StageLost as lost:
            self._is_whole = False
            log.warning("engine.lost reason=%s effect=the step is repeated", one_line(lost))
            return
        lasting = [_lasting(state) for state in self._kept]
        self._kept = [{**old, **new} for old, new in zip(lasting, states, strict=True)]
        self._done = self._done[num_done:]

    def _set(self, name: str, *args: Any) -> None:
        """Let the actors take something over that comes between two steps."""
        states = self._change(name, *args)
        self._kept, self._done, self._coming = states, [], None

    # ---- waves ----

    def train(self, jobs: Sequence[Job], step: int, wave: int) -> list[Answer]:
        """Run forward, loss and backward of a wave; see `Engine`."""
        found: list[Answer] = self._change("train", jobs, step, wave)
        return found

    def forward(
        self, jobs: Sequence[Job], step: int, wave: int, *, keeps: bool = True
    ) -> dict[Place, Array]:
        """Run forward for a wave whose labels stay on the devices; see `Engine`."""
        found: dict[Place, Array]
        if keeps:
            found = self._change("forward", jobs, step, wave)
        else:
            found = self._ask(lambda: self._chains.forward(jobs, step, wave, keeps=False))
        return found

    def backward(self, grads: Mapping[Place, Array]) -> list[Answer]:
        """Go back through what `forward` has left of these micro-batches; see `Engine`."""
        found: list[Answer] = self._change("backward", grads)
        return found

    def finish_step(self, step: int) -> bool:
        """Divide each block's gradient by the samples served in it, clip, update; see `Engine`."""
        is_done, states = self._change("finish_step", step)
        self._coming = len(self._done), states
        return bool(is_done)

    # ---- evaluation ----

    def evaluate(self, job: Job) -> TailSums | Array:
        """Return an evaluation micro-batch's loss, or its final hidden state; see `Engine`."""
        found: TailSums | Array = self._ask(lambda: self._chains.evaluate(job))
        return found

    def evaluate_whole(self, micro: MicroBatch) -> TailSums:
        """Return the loss of a micro-batch through the whole model; see `Engine`."""
        found: TailSums = self._ask(lambda: self._chains.evaluate_whole(micro))
        return found

    def predict_whole(self, micro: MicroBatch) -> IntArray:
        """Return the class of each sequence, by the whole model; see `Engine`."""
        found: IntArray = self._ask(lambda: self._chains.ask_whole("predict_whole", micro))
        return found

    def continue_texts(self, prompts: Sequence[Sequence[int]], manner: Manner) -> list[list[int]]:
        """Return the tokens that the whole model adds to each prompt; see `Engine`."""
        found: list[list[int]]
        found = self._ask(lambda: self._chains.ask_whole("continue_texts", prompts, manner))
        return found

    # ---- between rounds ----

    def learned(self) -> Learned:
        """Return what this round has made of its own weights; see `Engine`."""
        found: Learned = self._change("learned")
        return found

    def carried(self) -> Carried:
        """Return what the next engine goes on with; see `Engine`."""
        found: Carried = self._ask(self._chains.carried)
        return found

    def take(
        self,
        changes: Mapping[str, Factors],
        replaced: Mapping[str, Pair],
        head: Mapping[str, Array],
        *,
        restarts: bool = False,
    ) -> None:
        """Take over what an aggregation hands out, as a device does; see `Engine`."""
        self._set("take", changes, replaced, head, restarts)

    def begin(
        self,
        pairs: Mapping[str, Pair],
        residuals: Mapping[str, Factors] = NOTHING,
        carried: Carried | None = None,
    ) -> None:
        """Hold what a new engine of this run has to; see `Engine`."""
        self._set("begin", pairs, dict(residuals), carried)

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that a restart needs; see `Engine`."""
        found: dict[str, np.ndarray] = self._ask(self._chains.state)
        return found

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self._set("load_state", state)

    def close(self) -> None:
        """Let go of the actors."""
        self._chains.close()


WAVES = ("train", "forward", "backward")


def _lasting(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith(LASTING)}


@contextmanager
def ray_engines(config: ServeConfig) -> Iterator[EngineMaker]:
    """Have a cluster, and what makes engines on it, while a run lasts.

    Raises:
        ConfigError: Ray is not installed, no cluster is there, or it has too little.
    """
    with RayCluster(config.engine, config.device) as cluster:

        def make(spec: EngineSpec) -> RayEngine:
            return RayEngine(Chains(spec, cluster))

        yield make

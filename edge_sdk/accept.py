"""What a device takes part in, by its own word: everything else is refused on the device.

The coordinator decides what a run is; this decides whether this device is in it. It is asked when
the device is welcomed, again in the middle of a run, and at every plan and every round: a
coordinator that has been accepted once may ask for something else later. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edge_sdk.errors import NotAccepted, RemoteProtocolError
from edge_sdk.names import MAX_PART_BYTES
from edge_sdk.protocol.messages import PlanAssigned, RoundStart, Welcome
from edge_sdk.protocol.plan import MOST_IN_FLIGHT, Part, Plan, hash_of_parts
from edge_sdk.protocol.residual import RESIDUAL

GRAPHS = "graphs"
# Beyond all that was ever seen; numbers that are larger are a mistake, or meant to hurt.
MOST_SEQUENCES, MOST_RANK = 1 << 20, 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """What a coordinator may ask of this device; the defaults leave it all to the coordinator."""

    labels: Literal["server", "device"] = "server"
    """`device`: only runs in which labels stay on the devices, and with them token ids; `server`:
    also those that hand over the text that is learned."""
    min_split: int | Literal["all"] = 1
    """Least number of blocks that this device runs: after few blocks hidden states tell much of the
    text. `all`: every block, so that no hidden state leaves the device."""
    ids: bool = True
    """Whether token ids may be handed over, prompts included, where later blocks of a model need
    them; only with `labels: server`."""
    kept_states: bool = True
    """Whether the coordinator may keep hidden states beyond their step: on its disk (`replay`) or
    in its memory (`codec: residual`)."""
    model_hash: str = ""
    """Hash that the model must have: the one that `coordinator check` prints, computed here again
    from the hashes of all parts, with which each part is compared; empty takes any model."""
    graphs: tuple[str, ...] = ()
    """SHA-256 of the graphs that the onnxruntime backends may run; empty takes any that edgesplit's
    exporter could have written. The log names those that are used (`graphs.taken`)."""
    max_part_bytes: int = MAX_PART_BYTES
    """Size of the largest part of a model that is downloaded."""
    min_batch: int = 1
    """Least sequences of a step: a gradient of few tells more of each."""
    max_batch: int = MOST_SEQUENCES
    """Most sequences of a step."""
    min_steps: int = 1
    """Least steps of a round that trains: adapters after few tell more of each. A run's last round,
    where it is shorter, is refused as well."""
    max_steps: int = 1 << 31
    """Most steps of a round."""
    max_learning_rate: float | None = None
    """Largest learning rate of the run's schedule; None: any."""

    def __post_init__(self) -> None:
        if self.min_split != "all" and self.min_split < 1:
            raise ValueError(f"min_split must be at least 1, or 'all', got {self.min_split}")
        for name, value in (("model_hash", self.model_hash), *(("graphs", g) for g in self.graphs)):
            if value and (len(value) != 64 or set(value) - set("0123456789abcdef")):
                raise ValueError(f"{name} must be 64 digits of 0-9 and a-f, got {value!r}")
        if not 0 < self.max_part_bytes <= MAX_PART_BYTES:
            raise ValueError(
                f"max_part_bytes must be 1..{MAX_PART_BYTES}, got {self.max_part_bytes}"
            )
        pairs = (
            ("batch", self.min_batch, self.max_batch),
            ("steps", self.min_steps, self.max_steps),
        )
        for name, least, most in pairs:
            if not 1 <= least <= most:
                raise ValueError(f"min_{name} must be 1..max_{name}, got {least}..{most}")


def check_welcome(accept: Accept, welcome: Welcome) -> None:
    """Refuse a run that this device does not accept.

    Raises:
        NotAccepted: it is another one than `accept` allows; the message names the setting.
        RemoteProtocolError: the parts that it names are not those of its model.
    """
    _check_parts(welcome)
    expect = _expecting("the run has")
    labels = welcome.labels if welcome.labels == "device" else "server"
    expect("labels", accept.labels, labels, accept.labels in ("server", labels))
    expect("ids", accept.ids, "wants_ids", accept.ids or not welcome.wants_ids)
    _check_keeping(accept, "replay", is_asked=welcome.replays)
    is_told = bool(welcome.parts) or not accept.model_hash
    expect("model_hash", accept.model_hash[:12], "no list of its parts (older than 0.2)", is_told)
    is_same = accept.model_hash in ("", welcome.model_hash)
    expect("model_hash", accept.model_hash, welcome.model_hash, is_same)
    if accept.min_split != "all":
        can = accept.min_split <= welcome.num_blocks
        expect("min_split", accept.min_split, f"{welcome.num_blocks} blocks", can)
    if accept.max_learning_rate is not None:
        rate = _number(welcome.training.get("learning_rate", "inf"))
        is_low = rate <= accept.max_learning_rate
        expect("max_learning_rate", accept.max_learning_rate, rate, is_low)
    _check_size(accept, welcome.files)


def _check_parts(welcome: Welcome) -> None:
    """Refuse a list of parts that is not that of the model, as its hash and its blocks have it."""
    parts = welcome.parts
    if not parts:
        return
    if hash_of_parts(parts) != welcome.model_hash:
        raise RemoteProtocolError("the hashes of the model's parts are not those of `model_hash`")
    blocks = {f"block.{index}" for index in range(len(parts) - 3)}
    if parts.keys() != {"files", "front", "tail", *blocks} or len(blocks) != welcome.num_blocks:
        raise RemoteProtocolError(f"{len(parts)} parts are no model of {welcome.num_blocks} blocks")
    _check_part(welcome, welcome.files)


def check_plan(accept: Accept, welcome: Welcome, assigned: PlanAssigned) -> None:
    """Refuse a plan that this device does not accept, or that is none.

    Raises:
        NotAccepted: it asks for something else than `accept` allows.
        RemoteProtocolError: it makes no sense, or its parts are not those of the model.
    """
    plan = assigned.plan
    _check_sense(plan, welcome.num_blocks)
    if len({part.name for part in assigned.parts}) != len(assigned.parts):
        raise RemoteProtocolError("a plan with two parts of one name")
    expect = _expecting("the plan has")
    least = welcome.num_blocks if accept.min_split == "all" else accept.min_split
    expect("min_split", accept.min_split, f"split {plan.split}", plan.split >= least)
    expect("min_batch", accept.min_batch, plan.batch_size, plan.batch_size >= accept.min_batch)
    expect("max_batch", accept.max_batch, plan.batch_size, plan.batch_size <= accept.max_batch)
    codec = assigned.codec or welcome.codec
    _check_keeping(accept, f"codec {codec}", is_asked=codec == RESIDUAL)
    for part in assigned.parts:
        _check_size(accept, part)
        if part.name != GRAPHS:
            _check_part(welcome, part)
        elif accept.graphs:
            expect("graphs", "a list", part.sha256, part.sha256 in accept.graphs)


def check_round(accept: Accept, start: RoundStart) -> None:
    """Refuse a round of a length that this device does not accept.

    Raises:
        NotAccepted: it is too short or too long; one without any step trains nothing.
        RemoteProtocolError: it ends before it begins.
    """
    steps, expect = start.end_step - start.stamp.step, _expecting("the round has")
    if steps < 0 or start.stamp.step < 0:
        raise RemoteProtocolError(f"a round of {steps} steps from step {start.stamp.step} on")
    is_long = not steps or steps >= accept.min_steps
    expect("min_steps", accept.min_steps, f"{steps} steps", is_long)
    expect("max_steps", accept.max_steps, f"{steps} steps", steps <= accept.max_steps)


def _check_keeping(accept: Accept, what: str, *, is_asked: bool) -> None:
    expect = _expecting("the run has")
    expect("kept_states", accept.kept_states, what, accept.kept_states or not is_asked)


def _expecting(what: str) -> Callable[[str, object, object, bool], None]:
    """Return a function that refuses, in words for both operators."""

    def expect(name: str, wanted: object, found: object, is_accepted: bool) -> None:
        if not is_accepted:
            raise NotAccepted(
                f"this device accepts only {name}: {wanted}, {what} {found}; change the run, or "
                f"`accept.{name}` in the device's config"
            )

    return expect


def _check_sense(plan: Plan, num_blocks: int) -> None:
    batch, micro = plan.batch_size, plan.micro_batch
    is_good = (
        0 < plan.split <= num_blocks
        and 0 < micro <= batch <= MOST_SEQUENCES
        and batch % micro == 0
        and 0 < plan.in_flight <= MOST_IN_FLIGHT
        and all(0 <= rank <= MOST_RANK for rank in (*plan.ranks.values(), plan.residual_rank))
    )
    if not is_good:
        raise RemoteProtocolError(
            f"a plan of {plan.split} of {num_blocks} blocks, {batch} sequences in micro-batches of "
            f"{micro}, {plan.in_flight} under way, with ranks up to "
            f"{max(plan.ranks.values(), default=0)}"
        )


def _check_part(welcome: Welcome, part: Part) -> None:
    """Refuse a part that is not the one of this name in the list of the welcome."""
    if welcome.parts and welcome.parts.get(part.name) != part.sha256:
        raise RemoteProtocolError(f"part {part.name!r} is not the one that the welcome has named")


def _check_size(accept: Accept, part: Part) -> None:
    expect, most = _expecting(f"part {part.name!r} has"), accept.max_part_bytes
    expect("max_part_bytes", most, f"{part.num_bytes} bytes", part.num_bytes <= most)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")

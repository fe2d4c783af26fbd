"""What a device accepts: each setting refuses in one line what lies beyond it, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_sdk.accept import Accept, check_plan, check_round, check_welcome
from edge_sdk.client.config import ClientConfig
from edge_sdk.errors import NotAccepted, RemoteProtocolError
from edge_sdk.names import MAX_PART_BYTES
from edge_sdk.protocol.messages import PlanAssigned, RoundStart, Stamp, Welcome
from edge_sdk.protocol.plan import Part, Plan, hash_of_parts

NUM_BLOCKS = 4
HASHES = {
    name: f"{number:064x}"
    for number, name in enumerate(["files", "front", "tail", *(f"block.{i}" for i in range(4))])
}
MODEL = hash_of_parts(HASHES)
GRAPHS = "ab" * 32


def part(name: str, **changes: Any) -> Part:
    """A part of the model, or something else."""
    return replace(Part(name=name, sha256=HASHES.get(name, GRAPHS), num_bytes=100), **changes)


def welcome(**changes: Any) -> Welcome:
    """The greeting of an honest coordinator."""
    honest = Welcome(
        stamp=Stamp(run="run-1", device="a"),
        protocol=1,
        sdk_version="0",
        model_hash=MODEL,
        num_blocks=NUM_BLOCKS,
        files=part("files"),
        task="causal-lm",
        labels="server",
        codec="float16",
        max_length=64,
        num_labels=0,
        vocab_size=97,
        pad_id=0,
        training={"learning_rate": "0.001"},
        lora={},
        parts=HASHES,
    )
    return replace(honest, **changes)


def assigned(*parts: Part, codec: str = "", **changes: Any) -> PlanAssigned:
    """An honest plan of two blocks."""
    plan = Plan(split=2, ranks={"w": 4}, alphas={"w": 4.0}, batch_size=8, micro_batch=4)
    held = parts or tuple(map(part, ("front", "block.0", "block.1")))
    return PlanAssigned(stamp=Stamp(), plan=replace(plan, **changes), parts=held, codec=codec)


def start(steps: int) -> RoundStart:
    """A round of some steps."""
    return RoundStart(stamp=Stamp(step=10), end_step=10 + steps, is_full=False)


ACCEPTED: dict[str, tuple[dict[str, Any], Any]] = {
    "labels here": ({"labels": "device"}, welcome(labels="device")),
    "labels anywhere": ({"labels": "server"}, welcome(labels="device")),
    "ids": ({}, welcome(wants_ids=True)),
    "no ids": ({"ids": False}, welcome()),
    "replay": ({}, welcome(replays=True)),
    "held, but not asked for": ({"kept_states": False}, welcome(held_bytes=9)),
    "model": ({"model_hash": MODEL}, welcome()),
    "no list, no hash": ({}, welcome(parts={})),
    "rate": ({"max_learning_rate": 0.001}, welcome()),
    "split": ({"min_split": 2}, assigned()),
    "all": ({"min_split": "all"}, assigned(split=4)),
    "batch": ({"min_batch": 8, "max_batch": 8}, assigned()),
    "graphs": ({"graphs": (GRAPHS,)}, assigned(part("graphs"))),
    "any graphs": ({}, assigned(part("graphs"))),
    "part": ({"max_part_bytes": 100}, assigned()),
    "steps": ({"min_steps": 5, "max_steps": 5}, start(5)),
    "nothing to train": ({"min_steps": 5}, start(0)),
}
REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "labels": ({"labels": "device"}, welcome(), "labels: device, the run has server"),
    "no such labels": ({"labels": "device"}, welcome(labels="x"), "labels: device"),
    "ids": ({"ids": False}, welcome(wants_ids=True), "ids: False, the run has wants_ids"),
    "replay": ({"kept_states": False}, welcome(replays=True), "the run has replay"),
    "residual": ({"kept_states": False}, assigned(codec="residual"), "the run has codec residual"),
    "model": ({"model_hash": "0" * 64}, welcome(), "model_hash: 000000000000"),
    "no list": ({"model_hash": MODEL}, welcome(parts={}), "no list of its parts"),
    "too few blocks": ({"min_split": 5}, welcome(), "min_split: 5, the run has 4 blocks"),
    "rate": ({"max_learning_rate": 1e-4}, welcome(), "max_learning_rate: 0.0001"),
    "no rate": ({"max_learning_rate": 1.0}, welcome(training={"learning_rate": "x"}), "inf"),
    "files": ({"max_part_bytes": 99}, welcome(), "part 'files' has 100 bytes"),
    "split": ({"min_split": 3}, assigned(), "min_split: 3, the plan has split 2"),
    "all": ({"min_split": "all"}, assigned(split=3), "min_split: all, the plan has split 3"),
    "small batch": ({"min_batch": 9}, assigned(), "min_batch: 9, the plan has 8"),
    "large batch": ({"max_batch": 7}, assigned(), "max_batch: 7, the plan has 8"),
    "graphs": ({"graphs": ("cd" * 32,)}, assigned(part("graphs")), f"the plan has {GRAPHS}"),
    "part": ({"max_part_bytes": 99}, assigned(), "part 'front' has 100 bytes"),
    "short": ({"min_steps": 5}, start(4), "min_steps: 5, the round has 4 steps"),
    "long": ({"max_steps": 5}, start(6), "max_steps: 5, the round has 6 steps"),
}
SENSELESS: dict[str, Any] = {
    "another list": welcome(parts={**HASHES, "front": "0" * 64}),
    "a part more": welcome(parts={**HASHES, "x": "0" * 64}),
    "blocks": welcome(num_blocks=2),
    "files": welcome(files=part("files", sha256="f" * 64)),
    "foreign part": assigned(part("front", sha256="f" * 64)),
    "unknown part": assigned(part("block.7")),
    "part twice": assigned(part("front"), part("front")),
    "no blocks": assigned(split=0),
    "more blocks": assigned(split=5),
    "no sequences": assigned(batch_size=0, micro_batch=0),
    "uneven": assigned(micro_batch=3),
    "huge": assigned(batch_size=2**62, micro_batch=2**62),
    "many under way": assigned(in_flight=10**9),
    "rank": assigned(ranks={"w": 2**40}),
    "rank below 0": assigned(ranks={"w": -1}),
    "backwards": start(-1),
}


def check(accept: Accept, message: Any) -> None:
    """Ask what is to be asked about a message."""
    if isinstance(message, Welcome):
        check_welcome(accept, message)
    elif isinstance(message, PlanAssigned):
        check_plan(accept, welcome(), message)
    else:
        check_round(accept, message)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_a_device_accepts(case: str) -> None:
    """What lies within a setting is accepted, and so is it without any setting."""
    settings, message = ACCEPTED[case]

    check(Accept(**settings), message)
    check(Accept(), message)


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_device_does_not_accept(case: str) -> None:
    """What lies beyond a setting is refused, in one line that names it and what was asked."""
    settings, message, text = REFUSED[case]
    check(Accept(), message)
    with pytest.raises(NotAccepted) as refusal:
        check(Accept(**settings), message)

    line = str(refusal.value)
    assert text in line
    assert line.startswith(("this device accepts only ",))
    assert f"`accept.{next(iter(settings))}`" in line
    assert "\n" not in line


@pytest.mark.parametrize("case", SENSELESS)
def test_what_no_coordinator_may_ask(case: str) -> None:
    """A list of parts of another model, a part that is not in it, and a plan of nonsense."""
    with pytest.raises(RemoteProtocolError):
        check(Accept(), SENSELESS[case])


@pytest.mark.parametrize(
    "settings",
    [
        {"min_split": 0},
        {"model_hash": "abc"},
        {"model_hash": "G" * 64},
        {"graphs": ("x",)},
        {"max_part_bytes": 0},
        {"max_part_bytes": MAX_PART_BYTES + 1},
        {"min_batch": 0},
        {"min_batch": 9, "max_batch": 8},
        {"min_steps": 9, "max_steps": 8},
    ],
)
def test_settings_that_accept_nothing_are_refused(settings: dict[str, Any]) -> None:
    """A setting that is out of its range is a mistake of the config, not of the coordinator."""
    with pytest.raises(ValueError, match=next(iter(settings)).partition("_")[2] or "graphs"):
        Accept(**settings)


def test_the_old_name_of_the_hash_is_the_same_setting() -> None:
    """`model_hash` beside `accept` means `accept.model_hash`; two that differ are refused."""
    config = ClientConfig(coordinator="tcp://x:1", server_key="", model_hash=MODEL)

    assert config.accept == Accept(model_hash=MODEL)
    with pytest.raises(ValueError, match="model_hash and accept.model_hash differ"):
        ClientConfig(
            coordinator="tcp://x:1",
            server_key="",
            model_hash=MODEL,
            accept=Accept(model_hash="0" * 64),
        )

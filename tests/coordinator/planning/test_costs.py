"""What planning counts for codecs, and which one `auto` stands for."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.config.run import DeviceSettings
from coordinator.planning.costs import (
    AUTO_CODECS,
    LINK_SHARE,
    UNKNOWN_CODEC,
    codec_of,
    device_bytes,
    link_seconds,
    link_shares,
)
from coordinator.planning.joint import plan_all
from coordinator.planning.problem import PlanningProblem
from profiler.profile import DeviceProfile
from tests.coordinator.planning.problems import SLOW, make_problem, model_of


def problem_of(codec: Any = "auto", **profile: Any) -> PlanningProblem:
    """One device, whose profile is changed."""
    default = DeviceSettings(split=2, batch_size=4, micro_batch=2, codec=codec)
    own = replace(SLOW, round_trip_s=0.0, **profile)
    devices = {"a": DeviceSettings(split=2)}
    config = {"default": default, "devices": devices, "held_bytes": 1000, "labels": "server"}
    return make_problem(model_of("llama"), config=config, profiles={"a": own})


def test_auto_takes_as_many_bytes_as_the_link_carries() -> None:
    """The slower the link, the fewer bytes; each choice is the most exact whose time is enough."""
    found = []
    for speed in (1e9, 1e6, 5e5, 2e5, 1e5, 1e3):
        problem = problem_of(up_bytes_per_s=speed, down_bytes_per_s=speed)
        codec, shares = codec_of(problem, "a", 2), link_shares(problem, "a", 2)
        assert shares is not None
        enough = [name for name in AUTO_CODECS if shares[name] <= LINK_SHARE]
        assert codec == (enough or AUTO_CODECS[-1:])[0]
        found.append(AUTO_CODECS.index(codec))

    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, len(AUTO_CODECS) - 1)


@pytest.mark.parametrize("lacking", ["flops_per_s", "up_bytes_per_s", "down_bytes_per_s"])
def test_auto_without_knowledge_is_eight_bits(lacking: str) -> None:
    """Where speed or link are unknown, nothing is chosen by them."""
    assert codec_of(problem_of(**{lacking: None}), "a", 2) == UNKNOWN_CODEC
    nobody = make_problem(model_of("llama"), profiles={"a": DeviceProfile()})
    assert codec_of(nobody, "b", 2) == "bfloat16"


def test_auto_holds_nothing_where_memory_is_short() -> None:
    """A slow link alone does not make a device hold states for which it has no memory."""
    slow = {"up_bytes_per_s": 1e3, "down_bytes_per_s": 1e3}
    roomy = problem_of(**slow)
    need = device_bytes(roomy, "a", 2, {})
    tight = problem_of(**slow, memory_bytes=need + 500)

    assert codec_of(roomy, "a", 2) == "residual"
    assert codec_of(tight, "a", 2) == UNKNOWN_CODEC


def test_what_is_held_and_sent_is_counted() -> None:
    """`residual` costs the memory of what is held, and saves link time beside every other codec."""
    changes = problem_of("residual")
    more = replace(changes, config=replace(changes.config, held_bytes=5000))

    seconds = [
        link_seconds(changes, "a", codec, trains=True) or 0.0
        for codec in ("float32", "bfloat16", "int8", "int4", "residual")
    ]

    assert device_bytes(more, "a", 2, {}) - device_bytes(changes, "a", 2, {}) == 4000
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < 0.1 * seconds[0]


def test_a_plan_says_which_codec_and_why() -> None:
    """The notes that `coordinator plan` prints name the codec and the shares of all."""
    planned = plan_all(problem_of(up_bytes_per_s=1e3, down_bytes_per_s=1e3))

    (note,) = [n for n in planned.explanation.devices["a"].notes if n.startswith("codec ")]
    assert note.startswith("codec residual: its link takes")
    assert all(name in note for name in AUTO_CODECS)

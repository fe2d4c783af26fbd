"""Plans say exactly what was asked for, or the run does not start."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.fixed import check_config, plan_device, plan_server
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig, ModelFacts, Shape
from edge_sdk.model.layout import Layout

BLOCKS = 12


@pytest.fixture
def facts() -> ModelFacts:
    """A model of 12 blocks: 1 and 11 share their first letter."""
    layout = Layout("m.h", BLOCKS, (), tuple(() for _ in range(BLOCKS)), (), False, False)
    shapes = {f"m.h.{i}.attn.q": Shape(8, 8) for i in range(BLOCKS)}
    return ModelFacts(layout, shapes | {f"m.h.{i}.mlp.up": Shape(16, 8) for i in range(BLOCKS)})


def make_config(**changes: Any) -> ServeConfig:
    """A run of one device at split 2."""
    settings = {"split": 2, "r": 4, "batch_size": 8, "micro_batch": 2, **changes.pop("a", {})}
    lora = LoraConfig(r=changes.pop("r", 4))
    return ServeConfig(model="m", lora=lora, devices={"a": DeviceSettings(**settings)}, **changes)


def test_a_plan_holds_what_was_asked_for(facts: ModelFacts) -> None:
    """Blocks below the split get the rank, and nothing else does."""
    plan = plan_device(make_config(), facts, "a")

    assert (plan.split, plan.batch_size, plan.micro_batch, plan.tail) == (2, 8, 2, True)
    assert plan.ranks == {f"m.h.{i}.{n}": 4 for i in range(2) for n in ("attn.q", "mlp.up")}


@pytest.mark.parametrize(
    ("labels", "split", "tail"),
    [("device", 1, True), ("server", 1, False), ("server", BLOCKS, True)],
)
def test_who_gets_the_tail(facts: ModelFacts, labels: Any, split: int, tail: bool) -> None:
    """The tail is on the device with its labels, or with the whole model."""
    assert plan_device(make_config(labels=labels, a={"split": split}), facts, "a").tail is tail


def test_device_and_coordinator_share_every_weight(facts: ModelFacts) -> None:
    """What the device does not train the coordinator does, at its own rank."""
    config = make_config(server_rank=3)

    device, server = plan_device(config, facts, "a").ranks, plan_server(config, facts, 2)

    assert {*device, *server} == set(facts.targets)
    assert not device.keys() & server.keys()
    assert set(server.values()) == {3}
    assert facts.block_of("m.h.11.attn.q") == 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": 0}, r"devices.a.split: 0 is outside 1..12"),
        ({"split": 13}, r"devices.a.split: 13 is outside 1..12"),
        ({"r": 9}, r"rank 9 for 'm.h.0.attn.q' is outside 0..8"),
        ({"r": -1}, r"rank -1"),
        ({"micro_batch": 3}, r"devices.a.micro_batch: 3 does not divide batch_size 8"),
        ({"micro_batch": 16}, r"devices.a.micro_batch: 16 does not divide batch_size 8"),
        ({"batch_size": -2}, r"devices.a"),
    ],
)
def test_what_cannot_be_had_is_refused(
    facts: ModelFacts, settings: dict[str, int], message: str
) -> None:
    """Key, value and what is allowed stand in the message."""
    with pytest.raises(ConfigError, match=message):
        check_config(make_config(a=settings), facts)


def test_the_defaults_are_checked_too(facts: ModelFacts) -> None:
    """A device that nobody named yet must be able to join."""
    with pytest.raises(ConfigError, match="default.split: 40"):
        check_config(make_config(default=DeviceSettings(split=40)), facts)


def test_the_coordinator_starts_at_the_shallowest_split(facts: ModelFacts) -> None:
    """Its blocks begin where the first device ends."""
    assert check_config(make_config(default=DeviceSettings(split=5)), facts) == 2
    assert check_config(make_config(default=DeviceSettings(split=1)), facts) == 1


@pytest.mark.parametrize("change", [{"a": {"r": 2}}, {"server_rank": 2}])
def test_fedavg_needs_equal_ranks(facts: ModelFacts, change: dict[str, Any]) -> None:
    """Unequal ranks are refused before the run starts, unless the rule can join them."""
    check_config(make_config(**change), facts)
    check_config(make_config(aggregation="fedavg"), facts)

    with pytest.raises(ConfigError, match=r"'fedavg' needs equal ranks, the config gives \[2, 4\]"):
        check_config(make_config(aggregation="fedavg", **change), facts)


def test_a_fixed_split_below_the_least_is_refused(facts: ModelFacts) -> None:
    """A config with fewer blocks than `planning.min_split` does not start; as many are enough."""
    least = PlanningConfig(min_split=3)
    deep = DeviceSettings(split=3)

    check_config(make_config(a={"split": 3}, default=deep, planning=least), facts)

    with pytest.raises(ConfigError, match=r"devices.a.split: 2 is below planning.min_split 3"):
        check_config(make_config(default=deep, planning=least), facts)
    with pytest.raises(ConfigError, match=r"default.split: 1 is below planning.min_split 3"):
        check_config(make_config(a={"split": "all"}, planning=least), facts)
    with pytest.raises(ConfigError, match=r"planning.min_split: 13 is outside 1..12"):
        check_config(make_config(a={"split": "all"}, planning=PlanningConfig(min_split=13)), facts)


def test_a_planned_run_begins_at_the_least_split(facts: ModelFacts) -> None:
    """Where splits are planned, the default's is lifted to the least one, a device's own is not."""
    planning = PlanningConfig(split="memory", min_split=3)

    assert check_config(make_config(a={"split": 4}, planning=planning), facts) == 3
    assert plan_device(make_config(planning=planning), facts, "stranger").split == 3
    with pytest.raises(ConfigError, match=r"devices.a.split: 2 is below planning.min_split 3"):
        check_config(make_config(planning=planning), facts)

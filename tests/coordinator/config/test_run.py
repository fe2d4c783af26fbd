"""What a run is told is refused where it is impossible, and merged device by device."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from coordinator.aggregation.rules import RULES
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from edge_sdk.config.loader import load_config
from edge_sdk.config.values import field_types
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 0},
        {"steps_per_round": 0},
        {"min_devices": 0},
        {"save_total_limit": 0},
        {"patience_s": 0.0},
        {"max_rank": 0},
        {"max_rank": -1},
        {"server_learning_rate": 0.0},
        {"server_learning_rate": -0.5},
        {"server_learning_rate": float("inf")},
        {"server_learning_rate": float("nan")},
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, Any]) -> None:
    """The message names the key and the value."""
    ((name, value),) = change.items()

    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        ServeConfig(model="m", **change)


@pytest.mark.parametrize("name", ["batch_size", "every_rounds"])
def test_impossible_evaluations_are_refused(name: str) -> None:
    """Evaluation needs a batch and an interval."""
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EvaluationConfig(**{name: 0})


def test_a_classifier_names_its_classes() -> None:
    """Without at least two classes there is nothing to classify."""
    with pytest.raises(ValueError, match="at least 2 classes"):
        ServeConfig(model="m", task="sequence-classification", label_names=("one",))


def test_a_device_s_own_settings_come_first() -> None:
    """Own fields, then those of `default`, then what every device has."""
    config = ServeConfig(
        model="m",
        lora=LoraConfig(r=6),
        default=DeviceSettings(split=3, micro_batch=2),
        devices={"a": DeviceSettings(split=1, r=2, codec="float32")},
    )

    assert config.settings("a") == DeviceSettings(
        split=1, r=2, batch_size=8, micro_batch=2, codec="float32", in_flight=2, residual="auto"
    )
    assert config.settings("b") == DeviceSettings(
        split=3, r=6, batch_size=8, micro_batch=2, codec="bfloat16", in_flight=2, residual="auto"
    )


def test_a_run_has_rounds_times_steps() -> None:
    """The schedule's length is known from the start."""
    assert ServeConfig(model="m", rounds=3, steps_per_round=7).total_steps == 21


@pytest.mark.parametrize(("given", "nearest"), [("csv", "[csv]"), ("tensorbord", "[tensorboard]")])
def test_one_choice_in_place_of_a_list_is_told_how_to_write_it(given: str, nearest: str) -> None:
    """The hint can be taken as it stands."""
    with pytest.raises(ConfigError) as refused:
        load_config(ServeConfig, None, ["model=m", f"report_to={given}"], env={})

    assert str(refused.value).endswith(f", got {given!r}; did you mean {nearest}?")
    assert load_config(ServeConfig, None, ["model=m", f"report_to={nearest}"], env={}).report_to


def test_the_choices_of_aggregation_are_the_rules() -> None:
    """A rule is a choice by being in `RULES`; a wrong name is told the choices and the nearest."""
    assert get_args(field_types(ServeConfig)["aggregation"]) == tuple(RULES)
    names = " or ".join(repr(name) for name in RULES)

    with pytest.raises(ConfigError) as refused:
        load_config(ServeConfig, None, ["model=m", "aggregation=zeropat"], env={})

    assert str(refused.value) == (
        f"override aggregation: aggregation must be {names}, got 'zeropat'; did you mean 'zeropad'?"
    )
    with pytest.raises(ValueError, match="aggregation must be one of fedex, exact, stack"):
        ServeConfig(model="m", aggregation="zeropat")


@pytest.mark.parametrize(
    "change",
    [
        {"page": "127.0.0.1:7070"},
        {"listen": "tcp://*:9464", "report_to": ("prometheus",)},
        {"page": "127.0.0.1:9464", "report_to": ("csv", "prometheus")},
    ],
)
def test_a_run_has_a_port_for_each_of_its_addresses(change: dict[str, Any]) -> None:
    """Two of its own addresses with one port are named before anybody listens."""
    with pytest.raises(ValueError, match=r" and .* have one port, (7070|9464); give each its own"):
        ServeConfig(model="m", **change)


def test_any_port_is_another_one() -> None:
    """What the system chooses meets nothing."""
    ServeConfig(model="m", listen="tcp://*:*", page="127.0.0.1:0", report_to=("prometheus",))

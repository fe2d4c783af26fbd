"""What PEFT refuses to adapt gets no adapter, and nobody is left to guess."""

from __future__ import annotations

import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import find_layout
from tests.families import BLOCKS, more_config


@pytest.mark.parametrize(
    ("family", "adapted"),
    [("mamba", {"in_proj", "x_proj", "dt_proj"}), ("mamba2", {"in_proj"})],
)
def test_all_linear_is_all_that_peft_adapts(
    family: str, adapted: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The others are left out in every block, and a line of the log names them."""
    config = more_config(family)

    found = find_targets(config, "causal-lm", find_layout(config, "causal-lm"), LoraConfig())

    assert {name.rpartition(".")[2] for name in found} == adapted
    assert len(found) == BLOCKS * len(adapted)
    said = [line for line in caplog.messages if line.startswith("adapters.left_out")]
    assert said == ["adapters.left_out modules=out_proj reason=PEFT forbids them here"]


def test_a_module_that_peft_refuses_is_not_left_out_where_it_is_named() -> None:
    """One that was asked for by name is refused in one line."""
    config = more_config("mamba2")
    lora = LoraConfig(target_modules=("in_proj", "out_proj"))

    with pytest.raises(ConfigError, match="no adapter on 'out_proj'") as caught:
        find_targets(config, "causal-lm", find_layout(config, "causal-lm"), lora)

    assert "\n" not in str(caught.value)

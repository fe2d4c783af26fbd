"""What PEFT refuses to adapt gets no adapter, and nobody is left to guess."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

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


def test_a_linear_layer_with_a_forward_of_its_own_has_an_adapter() -> None:
    """Falcon's layers multiply by other code than torch's; all of them are adapted, as in PEFT."""
    config = AutoConfig.for_model(
        "falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    layout = find_layout(config, "causal-lm")

    found = find_targets(config, "causal-lm", layout, LoraConfig())

    leaves = {name.rpartition(".")[2] for name in found}
    assert leaves == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert len(found) == 8

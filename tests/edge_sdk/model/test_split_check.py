"""Before a run the pieces of its model are compared with the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from edge_sdk.errors import ModelError
from edge_sdk.model import split_check
from edge_sdk.model.kept import split_proof
from edge_sdk.model.kept.split_proof import prove_split
from edge_sdk.model.layout import Task, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.model.split_check import check_split, check_weights
from tests.tiny import FAMILIES, make_config, make_model, make_parts, task_of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_splits_is_let_through(family: str) -> None:
    """Split and whole agree on every family whose split the other tests prove."""
    check_split(make_config(family), task_of(family))


@pytest.mark.parametrize("method", ["front", "middle", "logits"])
def test_whoever_computes_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A device, a middle or a head that is off by a thousandth refuses the model in one line."""
    right = getattr(Slice, method)

    def off(self: Slice, *args: Any) -> torch.Tensor:
        return right(self, *args) + 0.001

    monkeypatch.setattr(Slice, method, off)

    with pytest.raises(ModelError, match="LlamaForCausalLM does not compute the same in pieces"):
        check_split(make_config("llama"), "causal-lm")


def test_a_tail_that_is_wrong_at_single_positions_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a few states do not show is found by the logits of a whole model."""
    right = Slice.at_positions
    monkeypatch.setattr(Slice, "has_local_tail", True)
    monkeypatch.setattr(Slice, "at_positions", lambda self, hidden: right(self, hidden) + 0.001)

    with pytest.raises(ModelError, match="LlamaForCausalLM does not compute the same in pieces"):
        check_split(make_config("llama"), "causal-lm")


def test_a_tail_that_looks_around_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given all positions, as before, and that is compared with the whole."""
    monkeypatch.setattr(Slice, "has_local_tail", False)

    check_split(make_config("llama"), "causal-lm")


def test_a_gradient_that_is_lost_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut through which too little gradient flows refuses the model, with the right logits."""
    right = Slice.front

    def half(self: Slice, *args: Any) -> torch.Tensor:
        hidden = right(self, *args)
        return hidden.detach() + (hidden - hidden.detach()) / 2

    monkeypatch.setattr(Slice, "front", half)

    with pytest.raises(ModelError, match="the gradient of 'model.layers.0"):
        check_split(make_config("llama"), "causal-lm")


def test_what_does_not_run_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a model's own code becomes one of ours, with its words and no line break."""

    def fail(*_: Any) -> torch.Tensor:
        raise TypeError("forward() lacks\nwhat it needs")

    monkeypatch.setattr(Slice, "front", fail)

    with pytest.raises(ModelError, match="does not run .*forward.. lacks what it needs") as caught:
        check_split(make_config("gpt2"), "causal-lm")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_own_weights_are_tried_on_the_first_and_the_last_block(family: str) -> None:
    """The real check runs on the model's own tensors, and reads no other block."""
    config, task = make_config(family), task_of(family)
    layout, model, read = find_layout(config, task), make_model(config, task), set()

    def tensors(part: str) -> Any:
        read.add(part)
        return make_parts(model, layout, [part])[part]

    assert check_weights(config, task, layout, tensors) == ""
    assert read == {"front", "block.0", "block.4", "tail"}


def test_weights_that_are_too_large_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number of weights nothing is loaded, and that is said."""
    config, task = make_config("llama"), task_of("llama")
    layout, model = find_layout(config, task), make_model(config, task)
    monkeypatch.setattr(split_check, "MOST_NUMBERS", 100)

    said = check_weights(config, task, layout, lambda p: make_parts(model, layout, [p])[p])

    assert said == "its blocks are too large for a quick look"


def test_random_numbers_go_on_as_without_the_check() -> None:
    """Torch and numpy draw afterwards what they would have drawn."""
    torch.manual_seed(3)
    np.random.seed(3)
    wanted = torch.rand(3), np.random.rand(3)
    torch.manual_seed(3)
    np.random.seed(3)

    check_split(make_config("gpt2"), "causal-lm")

    assert torch.equal(torch.rand(3), wanted[0])
    assert (np.random.rand(3) == wanted[1]).all()


# ---- the kept verdict ----


class Counted:
    """Counts checks, and fails the first *failures* of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int = 0) -> None:
        self.count, self._failures = 0, failures
        monkeypatch.setattr(split_check, "check_split", self)
        monkeypatch.setattr(split_proof, "_here", {})

    def __call__(self, _config: Any, _task: Task) -> None:
        """Stand in for the check."""
        self.count += 1
        if self.count <= self._failures:
            raise ModelError("it differs")


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(split_proof, "_here", {})


def test_a_good_verdict_is_kept_for_the_next_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One check serves later processes; another config is checked by itself."""
    counted, config = Counted(monkeypatch), make_config("llama")
    for _ in range(3):
        prove_split(config, "causal-lm", tmp_path)
        forget(monkeypatch)
    prove_split(AutoConfig.for_model("llama", hidden_size=64), "causal-lm", tmp_path)

    assert counted.count == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"note": 3}', "\x00" * 40])
def test_a_damaged_verdict_is_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    """Whatever a power cut has left of the file, the model is checked again and the file mended."""
    counted, config = Counted(monkeypatch), make_config("llama")
    prove_split(config, "causal-lm", tmp_path)
    (path,) = tmp_path.glob("*.split.json")
    whole = path.read_text()
    path.write_text(content)
    forget(monkeypatch)

    prove_split(config, "causal-lm", tmp_path)

    assert (counted.count, path.read_text()) == (2, whole)


def test_a_bad_verdict_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A refusal may have been the moment: the next start checks again."""
    Counted(monkeypatch, failures=1)
    config = make_config("llama")
    with pytest.raises(ModelError):
        prove_split(config, "causal-lm", tmp_path)

    prove_split(config, "causal-lm", tmp_path)


def test_a_cache_that_cannot_be_written_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where a file stands in place of the folder the check runs, and its verdict is forgotten."""
    counted = Counted(monkeypatch)
    (tmp_path / "parts").write_text("no folder")

    prove_split(make_config("llama"), "causal-lm", tmp_path / "parts")

    assert counted.count == 1

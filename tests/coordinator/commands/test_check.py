"""`coordinator check`: what it says of a model, with weights and without; bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from coordinator.cli import main
from edge_sdk.model.weights import ModelSource, model_hash
from tests.tiny import BLOCKS, CLASSES, make_config, make_model, task_of


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """Check, and return what is said by its first word."""
    assert main(["check", *arguments]) == 0
    said = capsys.readouterr().out.splitlines()
    return {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in said}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_config_alone_is_enough(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cuts, adapters and the verdict are those of the same model with weights, which has a hash."""
    config, task = make_config(family), task_of(family)
    make_model(config, task).save_pretrained(tmp_path / "whole")
    config.save_pretrained(tmp_path / "bare")

    bare = lines(capsys, "--model", str(tmp_path / "bare"), "--task", task)
    whole = lines(capsys, "--model", str(tmp_path / "whole"), "--task", task)

    assert "none lie beside its config" in bare.pop("split")
    assert "its own weights too" in whole.pop("split")
    source = ModelSource(str(tmp_path / "whole"), task)
    source.load_whole(0)
    own = model_hash({name: source.describe(name) for name in source.part_names()})
    assert whole.pop("hash") == f"{own} (`accept.model_hash` of a device)"
    assert bare == whole
    assert whole["cuts"] == f"a device can hold 1-{BLOCKS} of {BLOCKS} blocks"


def test_a_classifier_keeps_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head that was trained on more than two classes is tried as it is."""
    make_model(make_config("bert"), "sequence-classification").save_pretrained(tmp_path)
    assert CLASSES > 2

    said = lines(capsys, "--model", str(tmp_path), "--task", "sequence-classification")

    assert "its own weights too" in said["split"]


UNSPLIT: dict[str, dict[str, Any]] = {
    "no list of 3 blocks": {"model_type": "albert"},
    "they are not called as modules are": {"model_type": "squeezebert"},
    "an encoder with a decoder": {"model_type": "bart"},
}


@pytest.mark.parametrize("words", UNSPLIT)
def test_a_model_that_cannot_be_split_is_refused(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 8 and one line that says why."""
    AutoConfig.for_model(**UNSPLIT[words], num_hidden_layers=3).save_pretrained(tmp_path)

    code = main(["check", "--model", str(tmp_path), "--task", "sequence-classification"])

    error = capsys.readouterr().err.strip()
    assert (code, len(error.splitlines())) == (8, 1)
    assert words in error


def test_a_type_that_nobody_knows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The type is named."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))

    assert main(["check", "--model", str(tmp_path)]) == 8

    assert "unheard_of" in capsys.readouterr().err

"""What comes out is loaded by PEFT and transformers and computes what was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BertForMaskedLM

from coordinator.export import check
from coordinator.export.adapter import export_adapter
from coordinator.export.check import ExportError, load_base, trained_slice
from coordinator.export.merged import export_merged
from edge_sdk.errors import StorageError
from edge_sdk.lora.factors import zero
from edge_sdk.model.weights import ModelSource
from tests.coordinator.export.results import TOLERANCE, Result, difference
from tests.tiny import EXPERTS, make_config

FAMILIES = ["llama", "gpt2", "bert", *EXPERTS]
# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Result:
    """A run's result, family by family."""
    return Result(request.param, tmp_path / "base")


def test_peft_loads_the_adapter(trained: Result, tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` gives the logits of base plus dW, a trained head included."""
    difference = export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out")

    model = peft.PeftModel.from_pretrained(load_base(trained.source), tmp_path / "out")
    trained.check(model)
    trained.check(model.merge_and_unload())
    assert difference <= TOLERANCE
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    kept = {n: f for n, f in trained.learned.items() if f.rank}
    parameters = {n.removesuffix(".weight") for n in config["target_parameters"] or ()}
    assert parameters >= {n for n, f in kept.items() if f.a_RI.ndim == 3}
    assert {*config["target_modules"], *parameters} == kept.keys()
    assert not parameters or config["r"] == max(kept[n].rank for n in parameters)
    ranks = {n: f.rank for n, f in kept.items() if n not in parameters}
    assert config["rank_pattern"] == ranks
    assert config["alpha_pattern"] == ranks
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_a_large_model_is_checked_by_its_first_block(
    trained: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT puts the whole adapter on a model of one block, and what differs is found."""
    monkeypatch.setattr(check, "CHECK_BYTES", 0)
    monkeypatch.setattr(check, "load_base", None)

    difference = export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out")

    assert difference <= TOLERANCE
    other = {name: factors.scaled(1.001) for name, factors in trained.learned.items()}
    with pytest.raises(ExportError, match="read back"):
        check.verify(trained.source, other, trained.head, tmp_path / "out")
    monkeypatch.undo()
    trained.check(peft.PeftModel.from_pretrained(load_base(trained.source), tmp_path / "out"))


def test_a_model_with_dense_blocks_beside_experts_is_read_by_peft(tmp_path: Path) -> None:
    """PEFT takes today's dense layers for the experts of earlier versions, unless told better."""
    trained = Result("qwen3_moe", tmp_path / "base", mlp_only_layers=[1, 3])

    export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out")

    trained.check(peft.PeftModel.from_pretrained(load_base(trained.source), tmp_path / "out"))


@pytest.mark.parametrize("family", EXPERTS)
def test_a_merged_model_with_experts_computes_what_was_trained(family: str, tmp_path: Path) -> None:
    """What was learned of each expert is in its matrix, whichever way it lies."""
    trained = Result(family, tmp_path / "base")

    difference = export_merged(trained.source, trained.learned, trained.head, tmp_path / "out")

    model = type(load_base(trained.source)).from_pretrained(tmp_path / "out", dtype=torch.float32)
    trained.check(model)
    assert difference <= TOLERANCE


def test_the_coordinator_s_own_model_is_the_same(trained: Result) -> None:
    """Base and factors side by side, as the coordinator evaluates them, agree as well."""
    slice_ = trained_slice(trained.source, trained.learned, trained.head)

    trained.check(slice_.model)


@pytest.mark.parametrize("family", ["llama"])
def test_a_tampered_export_is_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that, read back, computes something else does not pass as an export."""
    trained = Result(family, tmp_path / "base")
    load = peft.PeftModel.from_pretrained

    def tampered(model: Any, folder: Path, **options: Any) -> Any:
        loaded = load(model, folder, **options)
        with torch.no_grad():
            name, parameter = next(
                (n, p) for n, p in loaded.named_parameters() if "lora_B" in n and p.numel()
            )
            parameter.mul_(1.5)
        assert name
        return loaded

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", tampered)

    with pytest.raises(ExportError, match="read back, its logits differ by"):
        export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out")


def test_a_run_that_learned_nothing_is_exported(tmp_path: Path) -> None:
    """All zeros are an adapter too: PEFT loads it and it changes nothing."""
    trained = Result("llama", tmp_path / "base")
    nothing = {n: zero(f.b_OR.shape[0], f.a_RI.shape[1]) for n, f in trained.learned.items()}

    assert export_adapter(trained.source, nothing, {}, tmp_path / "out") == 0.0


@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, write: Any) -> None:
    """A file in the folder's place: a storage error with exit code 9."""
    trained = Result("llama", tmp_path / "base")
    (tmp_path / "out").write_text("")

    with pytest.raises(StorageError, match="cannot write") as caught:
        write(trained.source, trained.learned, {}, tmp_path / "out" / "x")

    assert caught.value.exit_code == 9


def test_what_was_drawn_for_the_run_travels(tmp_path: Path) -> None:
    """A pooler that the base lacks, and that was not trained, is nowhere else but in the run."""
    config = make_config("bert")
    model: Any = BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "base")
    source = ModelSource(str(tmp_path / "base"), "sequence-classification", num_labels=4)
    source.load_whole(7)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(source.drawn)
    trained = Result("bert", tmp_path / "other")

    export_adapter(source, trained.learned, trained.head, tmp_path / "out")

    loaded = peft.PeftModel.from_pretrained(load_base(source), tmp_path / "out")
    ours = trained_slice(source, trained.learned, trained.head)
    assert difference(trained.logits(loaded), trained.logits(ours.model)) <= TOLERANCE


@pytest.mark.parametrize("write", [export_adapter, export_merged])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_all_files_of_an_export_have_one_mode(
    write: Callable[..., float], umask: int, tmp_path: Path
) -> None:
    """They are their owner's alone, whichever library wrote them and whatever the umask."""
    trained = Result("llama", tmp_path / "base")
    before = os.umask(umask)
    try:
        write(trained.source, trained.learned, trained.head, tmp_path / "out")
    finally:
        os.umask(before)

    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o600}

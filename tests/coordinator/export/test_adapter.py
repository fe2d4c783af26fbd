"""What comes out is loaded by PEFT and transformers and computes what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from coordinator.export.adapter import export_adapter
from coordinator.export.check import ExportError, load_base, trained_slice
from coordinator.export.merged import export_merged
from edge_sdk.errors import StorageError
from edge_sdk.lora.factors import Factors, zero
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.weights import ModelSource
from tests.tiny import CLASSES, VOCAB, make_config, make_model, task_of

FAMILIES = ["llama", "gpt2", "bert"]
TOLERANCE = 1e-5
# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Trained:
    """A tiny model on disk and what a run has learned about it."""

    def __init__(self, family: str, folder: Path) -> None:
        model: Any = make_model(make_config(family), task_of(family))
        model.save_pretrained(folder)
        task = task_of(family)
        num_labels = CLASSES if task == "sequence-classification" else 0
        self.source = ModelSource(str(folder), task, num_labels=num_labels)
        generator = np.random.default_rng(0)
        targets = find_targets(self.source.config, task, self.source.layout, LoraConfig())
        self.learned: dict[str, Factors] = {}
        for index, (name, shape) in enumerate(targets.items()):
            rank = index % 4  # some weights have learned nothing
            b_OR = generator.normal(0, 0.1, (shape.num_outputs, rank)).astype(np.float32)
            a_RI = generator.normal(0, 0.1, (rank, shape.num_inputs)).astype(np.float32)
            self.learned[name] = Factors(b_OR, a_RI)
        self.head = {}
        if num_labels:
            state = model.state_dict()
            names = ("classifier.weight", "classifier.bias")
            self.head = {n: state[n].numpy() + np.float32(0.3) for n in names}
        ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def expected(self) -> torch.Tensor:
        """Logits of base weights plus dense dW."""
        model: Any = load_base(self.source).eval()
        with torch.no_grad():
            for name, factors in self.learned.items():
                weight = model.get_submodule(name).weight
                change = torch.from_numpy(factors.b_OR @ factors.a_RI)
                weight += (
                    change if change.shape == weight.shape and not self._turned() else change.T
                )
            for name, value in self.head.items():
                model.get_parameter(name).copy_(torch.from_numpy(value))
            logits: torch.Tensor = model(**self.inputs).logits
        return logits

    def _turned(self) -> bool:
        return bool(self.source.config.model_type == "gpt2")

    def check(self, model: Any) -> None:
        """*model* computes the expected logits, which are not those of the base."""
        with torch.no_grad():
            found = model.eval()(**self.inputs).logits
            base = load_base(self.source).eval()(**self.inputs).logits
        expected = self.expected()
        assert float((found - expected).abs().max()) <= TOLERANCE
        assert float((base - expected).abs().max()) > 100 * TOLERANCE


@pytest.fixture(params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    """A run's result, family by family."""
    return Trained(request.param, tmp_path / "base")


def test_peft_loads_the_adapter(trained: Trained, tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` gives the logits of base plus dW, a trained head included."""
    difference = export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out")

    model = peft.PeftModel.from_pretrained(load_base(trained.source), tmp_path / "out")
    trained.check(model)
    trained.check(model.merge_and_unload())
    assert difference <= TOLERANCE
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {n: f.rank for n, f in trained.learned.items() if f.rank}
    assert config["rank_pattern"] == ranks
    assert config["alpha_pattern"] == ranks
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_transformers_loads_the_merged_model(trained: Trained, tmp_path: Path) -> None:
    """The merged model needs no PEFT and gives the same logits."""
    difference = export_merged(trained.source, trained.learned, trained.head, tmp_path / "out")

    merged = type(load_base(trained.source)).from_pretrained(tmp_path / "out", dtype=torch.float32)
    trained.check(merged)
    assert difference <= TOLERANCE


def test_the_coordinator_s_own_model_is_the_same(trained: Trained) -> None:
    """Base and factors side by side, as the coordinator evaluates them, agree as well."""
    slice_ = trained_slice(trained.source, trained.learned, trained.head)

    trained.check(slice_.model)


@pytest.mark.parametrize("family", ["llama"])
def test_a_tampered_export_is_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that, read back, computes something else does not pass as an export."""
    trained = Trained(family, tmp_path / "base")
    load = peft.PeftModel.from_pretrained

    def tampered(model: Any, folder: Path) -> Any:
        loaded = load(model, folder)
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
    trained = Trained("llama", tmp_path / "base")
    nothing = {n: zero(f.b_OR.shape[0], f.a_RI.shape[1]) for n, f in trained.learned.items()}

    assert export_adapter(trained.source, nothing, {}, tmp_path / "out") == 0.0


@pytest.mark.parametrize("write", [export_adapter, export_merged])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, write: Any) -> None:
    """A file in the folder's place: a storage error with exit code 9."""
    trained = Trained("llama", tmp_path / "base")
    (tmp_path / "out").write_text("")

    with pytest.raises(StorageError, match="cannot write") as caught:
        write(trained.source, trained.learned, {}, tmp_path / "out" / "x")

    assert caught.value.exit_code == 9

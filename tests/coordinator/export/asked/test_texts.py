"""What a run's model says is what transformers says of the export, whoever asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from coordinator.config.prompts import MOST_PROMPTS, read_prompts
from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.engine.whole import Manner
from coordinator.export.adapter import export_adapter
from coordinator.export.asked.texts import Prompting, text_ends
from coordinator.export.check import load_base
from coordinator.export.trained import TrainedModel
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.model.weights import load_tokenizer
from tests.coordinator.export.results import Result
from tests.e2e.cluster import save_model, write_rows
from tests.tiny import EXPERTS

GREEDY = Manner(max_new_tokens=12)
OURS = ("temperature", "seed", "ends", "batch_size")
# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def run_of(trained: Result) -> ServeConfig:
    """A run that has trained it."""
    return ServeConfig(model=str(trained.source.folder), device="cpu", compute="float32")


def model_of(trained: Result) -> TrainedModel:
    """The model as the coordinator holds it."""
    return TrainedModel(run_of(trained), trained.source, trained.learned, trained.head)


@pytest.mark.parametrize("family", ["llama", "gpt2", sorted(EXPERTS)[0]])
def test_it_says_what_peft_generates(family: str, tmp_path: Path) -> None:
    """The tokens that follow are those of PEFT and transformers on the adapter as exported."""
    trained = Result(family, tmp_path / "base")
    export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out")
    model: Any = peft.PeftModel.from_pretrained(load_base(trained.source), tmp_path / "out").eval()
    ids = trained.inputs["input_ids"][:1]

    ends = trained.source.config.get_text_config().eos_token_id
    assert text_ends(trained.source) == {ends}
    greedy = replace(GREEDY, ends=(ends,))
    found = model_of(trained).continue_texts([ids[0].tolist()], greedy)[0]

    said = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=ends)
    expected = said[0, ids.shape[1] :].tolist()
    assert found == [token for token in expected if token != ends]
    base = TrainedModel(run_of(trained), trained.source, {}, {})
    assert base.continue_texts([ids[0].tolist()], greedy)[0] != found


BEAMS = Manner(max_new_tokens=12, num_beams=4, length_penalty=0.8, no_repeat_ngram_size=3)


@pytest.mark.parametrize("manner", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_that_are_continued_together_are_answered_as_alone(
    family: str, manner: Manner, tmp_path: Path
) -> None:
    """A batch of prompts of several lengths gets PEFT's text for each, in their order."""
    trained = Result(family, tmp_path / "base")
    export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out")
    model: Any = peft.PeftModel.from_pretrained(load_base(trained.source), tmp_path / "out").eval()
    prompts = [[5, 6, 7, 8, 9], [11], [12, 13, 14], [5, 6], [40, 41, 42, 43, 44, 45, 46]]

    ends = trained.source.config.get_text_config().eos_token_id

    found = model_of(trained).continue_texts(prompts, replace(manner, ends=(ends,), batch_size=3))

    for ids, added in zip(prompts, found, strict=True):
        how = {f: getattr(manner, f) for f in Manner.__dataclass_fields__ if f not in OURS}
        said = model.generate(
            input_ids=torch.tensor([ids]), do_sample=False, eos_token_id=ends, **how
        )
        assert added == [token for token in said[0, len(ids) :].tolist() if token != ends]


def test_a_prompt_with_little_room_takes_none_from_others(tmp_path: Path) -> None:
    """Beside a prompt at the end of the model's positions another one is answered in full."""
    trained = Result("llama", tmp_path / "base")
    speaker = model_of(trained)
    long = [5 + n % 7 for n in range(62)]

    found = speaker.continue_texts([long, [5, 6]], GREEDY)

    assert found[1:] == speaker.continue_texts([[5, 6]], GREEDY)
    assert len(found[0]) <= 2


def test_beams_are_not_drawn() -> None:
    """Beams with a temperature are refused: only one of them can decide."""
    with pytest.raises(ConfigError, match="beams are searched, not drawn"):
        Manner(num_beams=2, temperature=0.5)


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    """One seed draws one text, another another, and nobody else's draws are disturbed."""
    trained = Result("llama", tmp_path / "base")
    speaker = model_of(trained)
    manner = Manner(max_new_tokens=12, temperature=1.5, seed=3)
    torch.manual_seed(7)
    undisturbed = torch.rand(3)

    torch.manual_seed(7)
    first = speaker.continue_texts([[5, 6, 7]], manner)
    assert torch.equal(torch.rand(3), undisturbed)

    assert speaker.continue_texts([[5, 6, 7]], manner) == first
    assert speaker.continue_texts([[5, 6, 7]], replace(manner, seed=4)) != first


def test_a_prompt_without_room_is_refused(tmp_path: Path) -> None:
    """A prompt as long as the model's positions is refused with both numbers."""
    speaker = model_of(Result("llama", tmp_path / "base"))

    with pytest.raises(ConfigError, match="a prompt of 4096 tokens"):
        speaker.continue_texts([[5] * 4096], GREEDY)


# ---- prompts ----


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and a chat template."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def config_of(model: Path, **evaluation: Any) -> ServeConfig:
    """A run that is evaluated."""
    return ServeConfig(model=str(model), evaluation=EvaluationConfig(**evaluation))


FORMS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "text": ([{"text": "a boat"}], "ab"),
    "completion": ([{"prompt": "a", "completion": "boat"}], "ab|"),
    "chat": (
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
        "user: ab\n",
    ),
}


@pytest.mark.parametrize(("rows", "expected"), FORMS.values(), ids=FORMS.keys())
def test_a_prompt_is_read_as_the_data_is(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], expected: str
) -> None:
    """A prompt has the form that a row of the evaluation file has before its answer."""
    path = str(write_rows(tmp_path / "dev.jsonl", rows))
    config = config_of(model, data=DataConfig(path=path, separator="|"))
    tokenizer = load_tokenizer(model)

    ids = Prompting(config, tokenizer).ids("ab")

    written: Any = tokenizer.convert_ids_to_tokens(ids)
    assert "".join(written).replace("<unk>", "|") == expected


def test_prompts_come_from_a_list_or_a_file(model: Path, tmp_path: Path) -> None:
    """A list, a file of rows and a file of lines give the same prompts."""
    (tmp_path / "p.txt").write_text("red boat\nold house\n")
    rows = [{"prompt": "red boat", "completion": "x"}, {"text": "old house"}]
    file = write_rows(tmp_path / "p.jsonl", rows)
    given: list[Any] = [["red boat", "old house"], str(tmp_path / "p.txt"), str(file)]

    found = [read_prompts(config_of(model, prompts=prompts).evaluation) for prompts in given]

    assert found == [["red boat", "old house"]] * 3


def test_what_cannot_be_asked_is_refused(model: Path, tmp_path: Path) -> None:
    """Too many prompts, rows without one, files without any, classifiers: each is named."""
    many = config_of(model, prompts=["a"] * (MOST_PROMPTS + 1))
    bad = config_of(model, prompts=str(write_rows(tmp_path / "bad.jsonl", [{"label": 1}])))
    none = config_of(model, prompts=str(write_rows(tmp_path / "none.jsonl", [])))
    classes = replace(config_of(model), task="sequence-classification", label_names=("a", "b"))

    with pytest.raises(ConfigError, match="at most 64 prompts"):
        read_prompts(many.evaluation)
    with pytest.raises(DataError, match=r"bad.jsonl:1: has no text under prompt, text"):
        read_prompts(bad.evaluation)
    with pytest.raises(DataError, match=r"none.jsonl"):
        read_prompts(none.evaluation)
    with pytest.raises(ConfigError, match="a classifier writes no text"):
        Prompting(classes, load_tokenizer(model))
    with pytest.raises(ValueError, match="must not hold an empty one"):
        EvaluationConfig(prompts=("a", ""))

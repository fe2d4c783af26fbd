"""Scores of texts and classes: when a run counts them, where they stand, and who asks later."""

from __future__ import annotations

import csv
import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics.bleu import BLEU
from sklearn.metrics import f1_score, matthews_corrcoef

from coordinator.cli import main
from coordinator.config.run import EvaluationConfig
from coordinator.config.scoring import GenerateConfig, Score
from coordinator.export.check import trained_slice
from coordinator.lab.centralised.run import read_pooled, train_pooled
from coordinator.results.run_config import read_config
from coordinator.results.run_folder import CONFIG, RunFolder
from edge_sdk.config.describe import dump_config
from edge_sdk.data.rows import DataConfig
from tests.coordinator.lab.centralised.centralised_runs import make_config, tokenized
from tests.e2e.cluster import WORDS, Cluster, classified, sentences, wait_all, write_rows
from tests.tiny import CLASSES

# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TEXT_SCORES: tuple[Score, ...] = ("bleu", "nist")
MOST, FEW = " ".join(string.ascii_lowercase), "s t a r s"
BEAMS = GenerateConfig(max_new_tokens=12, num_beams=2, batch_size=2, every_rounds=2)


def completions(path: Path) -> str:
    """Rows of three prompts, one of them with two references that stand apart.

    A tiny model writes the prompt's last letter again and again, which references hold.
    """
    pairs = (("a boat", MOST), ("birds", "s o s s"), ("a boat", FEW), ("x", MOST.upper()))
    return str(write_rows(path, [{"prompt": p, "completion": c} for p, c in pairs]))


def asked(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> dict[str, Any]:
    """What `coordinator score` says of a run."""
    capsys.readouterr()
    assert main(["score", str(folder), "--format", "json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_counts_scores_when_they_are_due(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts are scored every so many rounds and at the end; a person who asks gets the same."""
    data = DataConfig(path=completions(tmp_path / "pairs.jsonl"), separator="")
    evaluation = EvaluationConfig(data=data, scores=TEXT_SCORES, generate=BEAMS)
    config = cluster.config(rounds=3, evaluation=evaluation, save_total_limit=9)
    serving = cluster.serve(config).start()
    clients = cluster.start()
    assert serving.wait() == "completed"
    wait_all(clients)

    scored = {row["round"]: row["eval"] for row in serving.rows if "bleu" in row["eval"]}

    assert list(scored) == [0, 2, 3]
    assert any(own["nist"] > 0.0 for own in scored.values())
    serving.folder.write_text(CONFIG, dump_config(config))
    for round_ in (2, 3):
        found = asked(capsys, serving.folder.path, "--round", str(round_))
        assert {name: found[name] for name in TEXT_SCORES} == {
            name: scored[round_][name] for name in TEXT_SCORES
        }
        assert found["loss"] == pytest.approx(scored[round_]["loss"], rel=1e-5)


def test_what_was_written_can_be_had(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every prompt comes once, with all its references, and the texts give the score."""
    config = make_config(llama, tmp_path)
    train_pooled(config, sentences(1))
    data, texts = completions(tmp_path / "test.jsonl"), tmp_path / "texts.jsonl"
    short = ("evaluation.generate.max_new_tokens=12", "evaluation.data.separator=")

    words = ("--data", data, "--scores", "bleu", "nist", "--texts", str(texts), *short)
    found = asked(capsys, tmp_path / "runs" / "run", *words)

    rows = [json.loads(line) for line in texts.read_text("utf-8").splitlines()]
    assert [(row["prompt"], row["references"]) for row in rows] == [
        ("a boat", [MOST, FEW]),
        ("birds", ["s o s s"]),
        ("x", [MOST.upper()]),
    ]
    streams: Any = [[row["references"][0] for row in rows], [FEW, None, None]]
    score = BLEU(lowercase=True).corpus_score([row["text"] for row in rows], streams).score
    assert found["bleu"] == pytest.approx(score / 100)
    assert found["nist"] > 0.0
    assert main(["score", str(tmp_path / "runs" / "run"), "--data", data, "--scores", "f1"]) == 2
    assert "evaluation.scores: f1 is no score of causal-lm" in capsys.readouterr().err
    assert main(["score", str(tmp_path / "runs" / "run"), "--scores", "bleu"]) == 7
    assert "scores of texts need rows with prompt and completion" in capsys.readouterr().err


def test_the_result_is_scored_on_the_test_file(llama: Path, tmp_path: Path) -> None:
    """By default texts are scored at the end alone: in metrics, test, table, report and card."""
    path = completions(tmp_path / "pairs.jsonl")
    evaluation = EvaluationConfig(
        data=DataConfig(path=path, separator=""),
        test_file=path,
        scores=TEXT_SCORES,
        generate=replace(BEAMS, every_rounds=None),
    )
    config = make_config(llama, tmp_path, evaluation=evaluation, report_to=("csv",))

    result = train_pooled(config, sentences(1))

    assert ["nist" in row["eval"] for row in result.rows] == [False, False, True]
    tested = json.loads((result.folder / "test_results.json").read_text())
    last = result.rows[-1]["eval"]
    assert {name: tested[f"test_{name}"] for name in TEXT_SCORES} == {
        name: last[name] for name in TEXT_SCORES
    }
    (table,) = result.folder.rglob("numbers.csv")
    rows = csv.DictReader(table.read_text("utf-8").splitlines())
    numbers = {row["name"]: float(row["value"]) for row in rows}
    assert numbers["eval/nist"] == numbers["test/nist"] == last["nist"] > 0.0
    shown = f"{last['nist']:.4f}"
    assert (result.folder / "report.html").read_text("utf-8").count(shown) == 2
    assert f"| test NIST | {shown} |" in (result.folder / "adapter" / "README.md").read_text()


def test_classes_are_scored_at_each_evaluation(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Macro F1 and Matthews' correlation are scikit-learn's of the model's predictions."""
    names = tuple(WORDS[:CLASSES])
    path = str(write_rows(tmp_path / "classes.jsonl", classified(9, 20)))
    data = DataConfig(path=path, labels=names)
    config = make_config(
        bert,
        tmp_path,
        task="sequence-classification",
        label_names=names,
        evaluation=EvaluationConfig(data=data, scores=("f1_macro", "mcc")),
    )

    pooled = replace(config.pooled, data=DataConfig(labels=names))
    result = train_pooled(replace(config, pooled=pooled), classified(1))

    assert all({"f1_macro", "mcc"} <= row["eval"].keys() for row in result.rows)
    trained = read_pooled(RunFolder(result.folder), read_config(result.folder))
    slice_ = trained_slice(trained.source, trained.learned, trained.head)
    rows = tokenized(bert, classified(9, 20), labels=names)
    right, found = [example.labels for example in rows], []
    for example in rows:
        ids_BT = torch.from_numpy(example.input_ids)[None].long()
        with torch.no_grad():
            logits_BC = slice_.model(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)
            ).logits
        found.append(int(logits_BC.argmax()))
    last = result.rows[-1]["eval"]
    assert last["f1_macro"] == pytest.approx(f1_score(right, found, average="macro"))
    assert last["mcc"] == pytest.approx(matthews_corrcoef(right, found))
    assert asked(capsys, result.folder)["mcc"] == last["mcc"]
    assert np.mean(np.array(found) == np.array(right)) == pytest.approx(last["accuracy"])

"""The card says how a result came about without any data, and its snippet runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.export.adapter import LABELS, export_adapter, export_uniform
from coordinator.export.card import MOST_ROWS, Card
from coordinator.export.merged import export_merged
from edge_sdk.model.weights import ModelSource
from tests.coordinator.export.results import NAMES, Result, facts_of
from tests.e2e.cluster import save_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def snippet(folder: Path) -> str:
    """The Python on the card of an export."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "peft"),
        ("llama", "vllm"),  # which holds no classifier's head
        ("llama", "merged"),
        ("bert", "peft"),
        ("bert", "merged"),
    ],
)
def test_the_snippet_runs(
    family: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the export's folder, with the base's name made the path that it is here."""
    save_model(family, tmp_path / "base")
    trained = Result(family, tmp_path / "other")
    source = ModelSource(
        str(tmp_path / "base"), trained.source.task, num_labels=4 if trained.head else 0
    )
    out = tmp_path / "out"
    if kind == "vllm":
        export_uniform(source, trained.learned, out, trained.facts)
    else:
        write: Any = export_merged if kind == "merged" else export_adapter
        write(source, trained.learned, trained.head, out, trained.facts)
    monkeypatch.chdir(out)

    exec(snippet(out).replace("base = 'base'", f"base = {str(tmp_path / 'base')!r}"), {})

    printed = capsys.readouterr().out.strip()
    assert printed in NAMES if trained.head else printed


def test_an_adapter_of_a_classifier_names_its_classes(tmp_path: Path) -> None:
    """In a file of its own, as PEFT's config has no place for them."""
    trained = Result("bert", tmp_path / "base")

    export_adapter(trained.source, trained.learned, trained.head, tmp_path / "out", trained.facts)

    labels = json.loads((tmp_path / "out" / LABELS).read_text())
    assert labels["id2label"] == {str(n): name for n, name in enumerate(NAMES)}
    assert labels["label2id"] == {name: n for n, name in enumerate(NAMES)}
    assert labels["pad_token_id"] == 1


def test_a_base_from_a_hub_is_its_id_and_commit(tmp_path: Path) -> None:
    """Neither config nor card of any format holds a path; a hub reads where it came from."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
    trained = Result("llama", folder)
    for kind in ("adapter", "uniform", "merged"):
        out = tmp_path / kind
        if kind == "uniform":
            export_uniform(trained.source, trained.learned, out, trained.facts)
        else:
            write: Any = export_merged if kind == "merged" else export_adapter
            write(trained.source, trained.learned, {}, out, trained.facts)

        card = (out / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/tiny"
        assert commit in card
        for path in out.glob("*"):
            assert str(tmp_path).encode() not in path.read_bytes(), path
        if kind != "merged":
            config = json.loads((out / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == "someone/tiny"
            assert config["revision"] == commit


def test_a_base_of_one_s_own_is_its_name(tmp_path: Path) -> None:
    """A local folder is named, and where it lies is not; a hub is told of no base."""
    trained = Result("llama", tmp_path / "my-model")

    export_adapter(trained.source, trained.learned, {}, tmp_path / "out", trained.facts)

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert (config["base_model_name_or_path"], config["revision"]) == ("my-model", None)
    assert "`my-model` (a local folder" in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert str(tmp_path) not in card


@pytest.mark.parametrize("rounds", [1, MOST_ROWS - 1, MOST_ROWS, 500])
def test_a_long_run_has_a_short_curve(rounds: int, tmp_path: Path) -> None:
    """At most so many rows of losses, in order, the first and the last among them."""
    trained = Result("llama", tmp_path / "base")
    card = Card(source=trained.source, format="peft", ranks={"x": 1}, facts=facts_of(rounds=rounds))

    shown = [int(n) for n in re.findall(r"^\| (\d+) \|.*\|.*\|$", card.text(), flags=re.MULTILINE)]

    assert len(shown) == min(rounds + 1, MOST_ROWS)
    assert (shown[0], shown[-1]) == (0, rounds)
    assert shown == sorted(set(shown))

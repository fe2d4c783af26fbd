"""`coordinator export`: every format by its option, and one line for what cannot be had."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from coordinator import ExportOptions, export_run
from coordinator.cli import main
from coordinator.lab.centralised.run import train_pooled
from edge_sdk.lora.targets import LoraConfig
from tests.coordinator.export.fake_hub import TOKEN, fake_hub
from tests.coordinator.lab.centralised.centralised_runs import make_config
from tests.e2e.cluster import save_model, sentences

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
LABELLED = [{"text": f"a {'red' if n % 2 else 'green'} boat", "label": n % 4} for n in range(12)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that trains adapters of a language model, one that trains all of its weights."""
    folder = tmp_path_factory.mktemp("runs")
    model = save_model("llama", folder / "model", num_hidden_layers=2)
    found = {}
    for name, trains in (("adapters", "adapters"), ("all", "all")):
        config = make_config(
            model,
            folder,
            name=name,
            rounds=1,
            trains=trains,
            lora=LoraConfig(r=12, lora_alpha=24),
        )
        found[name] = train_pooled(config, sentences(1)).folder
    return found


def export(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Exit code and all that was printed."""
    code = main(["export", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_every_format_by_its_option(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that says it is done, and the files that each format has."""
    run = runs["adapters"]
    for arguments, file in (
        ([], "adapter_config.json"),
        (["--format", "peft"], "adapter_config.json"),
        (["--format", "vllm"], "adapter_config.json"),
        (["--merged"], "model.safetensors"),
        (["--format", "merged", "--dtype", "float32"], "model.safetensors"),
    ):
        out = tmp_path / "-".join(["out", *arguments])
        code, printed = export(capsys, run, "--to", out, *arguments)
        assert code == 0, printed
        assert f"written to {out}; read back, logits differ by" in printed
        assert (out / file).is_file()
        card = (out / "README.md").read_text()
        assert "| rounds | 1 |" in card
        assert re.search(r"^\| 1 \| \d\.\d{4} \| \d\.\d{4} \|$", card, flags=re.MULTILINE)


def test_cut_ranks_are_told_with_what_they_cost(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many weights lose something, the worst of them, and the loss before and after."""
    run = runs["adapters"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    code, printed = export(capsys, run, "--to", tmp_path / "out", "--max-rank", 1)

    assert code == 0, printed
    assert re.search(r"cut to rank 1: 14 of 14 weights lose .* most: model\.layers\.", printed)
    before = f"{metrics[-1]['eval']['loss']:.4f}"
    assert re.search(rf"evaluation loss: {before} with all ranks, \d\.\d{{4}} with 1", printed)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {1}
    code, printed = export(capsys, run, "--to", tmp_path / "all", "--max-rank", 12)
    assert "cut to rank 12: nothing is lost" in printed


def test_vllm_s_own_limit_is_told(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within what it takes by default the line is short, beyond it names option and way out."""
    _, printed = export(capsys, runs["adapters"], "--to", tmp_path / "a", "--format", "vllm")
    assert "all weights have rank 16, padded from 12\n" in printed


def test_a_run_that_trained_all_weights(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a whole model whether that is said or not, and no adapter."""
    run = runs["all"]
    code, printed = export(capsys, run, "--to", tmp_path / "out")
    assert (code, "model written to" in printed) == (0, True)

    code, printed = export(capsys, run, "--to", tmp_path / "no", "--format", "vllm")

    assert code == 2
    assert "there is no adapter; use --format merged" in printed
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--merged", "--format", "vllm"], "--merged: contradicts --format vllm"),
        (["--max-rank", "0"], "--max-rank: must be at least 1"),
        (["--merged", "--max-rank", "4"], "--max-rank: a merged model has no ranks"),
        (["--dtype", "float16"], "--dtype: is for --format merged"),
        (["--llama-cpp", "x"], "--llama-cpp: is for --format gguf"),
        (["--public"], "--public: is for --push-to-hub"),
        (["--format", "gguf", "--llama-cpp", "nowhere"], "no convert_lora_to_gguf.py at nowhere"),
        (["--push-to-hub", "a b"], "--push-to-hub:"),
        (["--push-to-hub", "me/mine"], "--push-to-hub: there is no token"),
    ],
)
def test_what_cannot_be_had_is_said_before_anything_is_loaded(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, exit code 2, and no folder: not even the run is looked for."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)

    code, printed = export(capsys, "no-run", "--to", tmp_path / "out", *arguments)

    assert code == 2
    assert says in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_known_without_torch_is_said_without_it(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """A folder that is not empty, a converter or a prompt that is missing: nobody waits for it."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    run = str(runs["adapters"])
    wrong = [
        ["export", run, "--to", str(tmp_path / "full")],
        ["export", run, "--to", str(tmp_path / "no"), "--format", "gguf", "--llama-cpp", "nowhere"],
        ["generate", run],
    ]
    program = (
        "import sys; from coordinator.cli import main; "
        f"print([main(each) for each in {wrong}], 'torch' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[2, 2, 2] False\n"
    assert "importing torch" not in done.stderr


def test_an_export_says_what_it_waits_for(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is read and written is said before it takes its time, beside the result's line."""
    assert main(["export", str(runs["adapters"]), "--to", str(tmp_path / "out")]) == 0

    printed = capsys.readouterr()
    assert f"reading model and result of run adapters, writing {tmp_path / 'out'}" in printed.err
    assert printed.out.startswith("adapter written to ")


def test_a_push_follows_the_export(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything that was written arrives, and the line says where."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out = tmp_path / "out"
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)

        code, printed = export(capsys, runs["adapters"], "--to", out, "--push-to-hub", "me/mine")

    assert code == 0, printed
    assert f"pushed to {hub.address}/me/mine" in printed
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.private == {"me/mine": True}


def test_the_evaluation_file_may_be_gone(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the loss is not compared, and a line says so."""
    run = tmp_path / "run"
    shutil.copytree(runs["adapters"], run)
    config = (run / "config.resolved.yaml").read_text()
    gone = re.sub(r"path: .*dev.jsonl", "path: gone.jsonl", config)
    assert gone != config
    (run / "config.resolved.yaml").write_text(gone)

    code, printed = export(capsys, run, "--to", tmp_path / "out", "--max-rank", 1)

    assert code == 0, printed
    assert re.search(r"^the evaluation loss is not compared: .*gone\.jsonl", printed, re.MULTILINE)


def test_a_program_says_the_same_as_the_command() -> None:
    """The public door has the options and takes a folder."""
    assert ExportOptions(format="vllm", max_rank=16).format == "vllm"
    assert export_run.__module__ == "coordinator.export.run"

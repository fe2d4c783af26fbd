"""A run on pooled data looks like any run, resumes like any run, and says what it lacks."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import peft
import pytest
from transformers import AutoModelForCausalLM

from coordinator.cli import main
from coordinator.config.centralised import PooledConfig
from coordinator.config.run import EvaluationConfig
from coordinator.engine.server_model import ServerModel
from coordinator.lab.centralised.run import resume_pooled, serve_pooled, train_pooled
from coordinator.lab.centralised.trainer import MicroShape, PooledTrainer
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import StepDone
from coordinator.results.watchers import Watchers
from coordinator.steering.asking import ask
from coordinator.steering.wishes import Kind, Wish
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError, StorageError
from edge_sdk.lora.targets import LoraConfig
from tests.coordinator.lab.centralised.centralised_runs import make_config, shard_files, tokenized
from tests.damage import DAMAGES
from tests.e2e.cluster import Crash, save_model, sentences, write_rows

# PEFT asks transformers for a property that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is tied to its embeddings."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def test_rows_are_those_of_any_run(llama: Path, tmp_path: Path) -> None:
    """A row a round with samples, steps and scores; sizes of every micro-batch; a PEFT adapter."""
    config = make_config(llama, tmp_path, evaluation=EvaluationConfig())
    rows = sentences(1)

    result = train_pooled(config, rows)

    assert [(row["round"], row["step"], row.get("samples")) for row in result.rows] == [
        (0, 0, None),
        (1, 3, 18),
        (2, 6, 18),
    ]
    assert result.rows[1]["rank"] == 4
    assert result.rows[1]["train_loss"] > result.rows[2]["train_loss"]
    lengths = [len(example.input_ids) for example in tokenized(llama, rows)]
    batches = PooledTrainer(config, ServerModel(config), rows).batches
    for step, micros in enumerate(result.shapes):
        own = sorted((lengths[i] for i in batches.samples_at(step)), reverse=True)
        parts = [own[:2], own[2:4], own[4:]]
        assert list(micros) == [MicroShape(2, part[0], sum(part)) for part in parts]
    assert len(result.shapes) == 6
    base = AutoModelForCausalLM.from_pretrained(llama)
    peft.PeftModel.from_pretrained(base, result.folder / "adapter")
    assert "pooled data" in (result.folder / "adapter" / "README.md").read_text()


class Interrupted:
    """Presses Ctrl-C, or lets the program die, after so many steps."""

    def __init__(self, after: int, *, crashes: bool) -> None:
        self.left, self.crashes = after, crashes

    def see(self, event: RunEvent) -> None:
        """Count steps."""
        self.left -= isinstance(event, StepDone)
        if self.left or not isinstance(event, StepDone):
            return
        if self.crashes:
            raise Crash
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("trains", "after", "crashes"),
    [("adapters", 2, False), ("all", 5, True), ("all", 3, False)],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    llama: Path, tmp_path: Path, trains: Any, crashes: bool, after: int
) -> None:
    """Metrics and result have the same bytes, wherever the run was interrupted."""
    pooled = PooledConfig(files=shard_files(tmp_path), batch_size=6, micro_batch=3, trains=trains)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1)
    config = make_config(llama, tmp_path, pooled=pooled, lora=lora)
    whole = replace(config, name="whole")

    assert serve_pooled(whole, Watchers()) == "completed"
    with nullcontext() if not crashes else pytest.raises(Crash):
        assert serve_pooled(config, Interrupted(after, crashes=crashes)) == "paused"
    assert resume_pooled(config.runs / "run", Watchers(), []) == "completed"

    names = ["metrics.jsonl", "adapter/adapter_model.safetensors"]
    if trains == "all":
        names[1] = "model/model.safetensors"
    for name in names:
        expected = (whole.runs / "whole" / name).read_bytes()
        assert (config.runs / "run" / name).read_bytes() == expected
    telemetry = (config.runs / "run" / "telemetry.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in telemetry] == [0, 1]


class Asking:
    """A watcher in whose run somebody asks for something, once the first step is done."""

    def __init__(self, folder: Path, wish: Wish) -> None:
        self._folder, self._wish, self.outcome = folder, wish, ""
        self._thread, self._taken = Thread(target=self._ask), Event()

    def _ask(self) -> None:
        self.outcome = ask(self._folder, self._wish, self._taken.set)

    def see(self, event: RunEvent) -> None:
        """Ask from another thread, through the run's socket, and wait until that is known."""
        if isinstance(event, StepDone) and not self._taken.is_set():
            self._thread.start()
            assert self._taken.wait(30.0)

    def answer(self) -> str:
        """What whoever asked was told."""
        self._thread.join(30.0)
        return self.outcome


@pytest.mark.parametrize("kind", ["pause", "stop"])
@pytest.mark.parametrize("after_round", [False, True])
def test_a_run_is_steered_from_another_shell(
    llama: Path, tmp_path: Path, kind: Kind, after_round: bool
) -> None:
    """Paused or stopped, after a step or a round, it goes on to the bytes of an undisturbed one."""
    pooled = PooledConfig(files=shard_files(tmp_path), batch_size=6, micro_batch=3)
    config = make_config(llama, tmp_path, pooled=pooled)
    whole = replace(config, name="whole")
    assert serve_pooled(whole, Watchers()) == "completed"
    asking = Asking(config.runs / "run", Wish(kind, after_round))

    outcome = serve_pooled(config, asking)

    assert outcome == asking.answer() == {"pause": "paused", "stop": "stopped"}[kind]
    has_result = (config.runs / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert has_result == (kind == "stop")
    steps = [path.name for path in (config.runs / "run").glob("checkpoint-*")]
    assert max(steps) == ("checkpoint-000003" if after_round else "checkpoint-000001")
    assert resume_pooled(config.runs / "run", Watchers(), []) == "completed"
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        expected = (whole.runs / "whole" / name).read_bytes()
        assert (config.runs / "run" / name).read_bytes() == expected


def test_what_cannot_be_trained_is_one_line(llama: Path, tmp_path: Path) -> None:
    """No data, two places for it, sizes that do not divide, a checkpoint of something else."""
    with pytest.raises(ConfigError, match=r"pooled.data.path: names no training data"):
        train_pooled(make_config(llama, tmp_path))
    with pytest.raises(ConfigError, match="pooled.micro_batch: 5 does not divide batch_size 8"):
        train_pooled(make_config(llama, tmp_path, pooled=PooledConfig(micro_batch=5)), sentences(1))
    with pytest.raises(ValueError, match=r"files or data.path, not both"):
        PooledConfig(files=("a",), data=DataConfig(path="b"))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        PooledConfig(batch_size=0)
    with pytest.raises(ConfigError, match="trained_by: must be 'coordinator'"):
        train_pooled(make_config(llama, tmp_path, trained_by="devices"), sentences(1))
    assert not (tmp_path / "runs").exists()

    train_pooled(make_config(llama, tmp_path), sentences(1))
    file = f"pooled.data.path={write_rows(tmp_path / 'x.jsonl', sentences(1))}"
    with pytest.raises(StorageError, match="its checkpoint does not fit its config"):
        resume_pooled(tmp_path / "runs" / "run", Watchers(), [file, "pooled.trains=all"])


def test_the_command_trains_resumes_and_exports(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`serve --preset ft` needs no keys and no socket; resume, status and export know its run."""
    write_rows(tmp_path / "train.jsonl", sentences(1))
    (tmp_path / "run.yaml").write_text(
        f"model: {llama}\nrounds: 2\nsteps_per_round: 2\nname: run\n"
    )
    data = [f"pooled.data.path={tmp_path / 'train.jsonl'}", f"runs={tmp_path}", "device=cpu"]
    run, out = str(tmp_path / "run"), tmp_path / "out"

    assert main(["serve", "--preset", "ft", "--config", str(tmp_path / "run.yaml"), *data]) == 0
    assert main(["resume", run, "rounds=3"]) == 0
    assert main(["status", run, "--format", "json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert main(["export", run, "--to", str(out)]) == 0

    assert status["rounds_done"] == 3
    assert "model written to" in capsys.readouterr().out
    exported, own = out / "model.safetensors", tmp_path / "run" / "model" / "model.safetensors"
    assert exported.read_bytes() == own.read_bytes()
    assert main(["serve", "--preset", "ft", "trained_by=devices", f"model={llama}"]) == 2
    assert "trained_by must be 'coordinator' with preset 'ft'" in capsys.readouterr().err


def test_a_damaged_checkpoint_costs_only_its_steps(llama: Path, tmp_path: Path) -> None:
    """The older one leads to the same bytes, and the console says which one was damaged."""
    pooled = PooledConfig(files=shard_files(tmp_path), batch_size=6, micro_batch=3)
    config = make_config(llama, tmp_path, pooled=pooled)
    whole = replace(config, name="whole")
    assert serve_pooled(whole, Watchers()) == "completed"
    assert serve_pooled(config, Interrupted(4, crashes=False)) == "paused"
    run = config.runs / "run"
    newest = sorted(run.glob("checkpoint-*"))[-1]
    DAMAGES["a bit in the middle"](newest / "trainer.safetensors")
    seen = Notes()

    assert resume_pooled(run, seen, []) == "completed"

    assert seen.notes[0].startswith(f"{newest.name}: damaged: trainer.safetensors is not as it")
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (whole.runs / "whole" / name).read_bytes()


def test_a_run_is_taken_up_at_any_moment(llama: Path, tmp_path: Path) -> None:
    """Before its first checkpoint it begins anew; after its end only its result counts."""
    pooled = PooledConfig(files=shard_files(tmp_path), batch_size=6, micro_batch=3)
    config = make_config(llama, tmp_path, pooled=pooled)
    assert serve_pooled(config, Watchers()) == "completed"
    run = config.runs / "run"
    result = run / "adapter" / "adapter_model.safetensors"
    metrics, adapter = (run / "metrics.jsonl").read_bytes(), result.read_bytes()

    again = Notes()
    assert resume_pooled(run, again, []) == "completed"
    assert again.notes == [f"run {run} is complete; `rounds=N` with more of them goes on"]
    DAMAGES["missing"](result)
    assert resume_pooled(run, again, []) == "completed"
    assert result.read_bytes() == adapter
    assert (run / "metrics.jsonl").read_bytes() == metrics

    for path in run.iterdir():
        if path.name not in ("config.resolved.yaml", "events.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert resume_pooled(run, Watchers(), []) == "completed"
    assert result.read_bytes() == adapter
    assert (run / "metrics.jsonl").read_bytes() == metrics


class Notes:
    """Keeps what a person reads."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def see(self, event: RunEvent) -> None:
        """Keep its lines."""
        self.notes.extend(event.text.splitlines())

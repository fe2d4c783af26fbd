"""Whatever is wrong is said in one line, with its own exit code, and hurts nobody else."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForSequenceClassification

from coordinator.cli import main as coordinator_main
from coordinator.rounds.loop import Coordinator
from edge_sdk import errors
from edge_sdk.cli import main as edge_main
from edge_sdk.client import participant
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import EdgeError, PeerGone, RefusedError, StorageError
from edge_sdk.protocol.messages import PROTOCOL_VERSION
from edge_sdk.transport.keys import create_key_pair, load_key_pair
from tests.e2e.cluster import Cluster, save_model, sentences, wait_all
from tests.e2e.programs import write_yaml

# ---- the coordinator, before it starts ----


@pytest.fixture
def run_yaml(cluster: Cluster) -> Path:
    """A configuration that would work."""
    return write_yaml(
        cluster.folder / "run.yaml",
        {
            "model": str(cluster.model),
            "listen": "tcp://127.0.0.1:*",
            "secret_key": "coordinator.key",
            "allow_list": "devices.yaml",
            "runs": "runs",
            "device": "cpu",
        },
    )


def refuse(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Serve, expect *code* and one line on stderr beside what takes a while; return the line."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        # What is not refused must not wait for devices for ever.
        patch.setattr(Coordinator, "serve", lambda _self: "served")
        assert coordinator_main(["serve", "--config", *arguments]) == code
    captured = capsys.readouterr()
    waits = ("importing torch", "reading model ")
    lines = [one for one in captured.err.strip().splitlines() if not one.startswith(waits)]
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    assert lines[0].startswith("coordinator: ")
    return lines[0]


CONFIGS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "unknown key": ("rouds=3", 2, ("rouds", "did you mean", "rounds")),
    "wrong type": ("rounds=many", 2, ("rounds", "many")),
    "split 0": ("default.split=0", 2, ("default.split", "0", "1..5")),
    "split 9": ("devices.b.split=9", 2, ("devices.b.split", "9", "1..5")),
    "rank": ("default.r=33", 2, ("rank 33", "0..32")),
    "micro-batch": ("default.micro_batch=3", 2, ("default.micro_batch", "3", "batch_size 8")),
    "target": ("lora.target_modules=[qkv]", 2, ("lora.target_modules", "qkv", "q_proj")),
    "length": ("max_length=65", 2, ("max_length", "65", "64")),
    "key": ("secret_key=absent.key", 2, ("absent.key", "cannot read")),
    "missing model": ("model=./absent", 8, ("absent", "does not exist")),
    "missing data": ("evaluation.data.path=absent.jsonl", 7, ("absent.jsonl",)),
    "fedavg": ("aggregation=fedavg server_rank=3 devices.a.split=3", 2, ("fedavg", "equal ranks")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_work(
    cluster: Cluster, run_yaml: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """The key, the value and what is allowed; and no run folder."""
    override, code, words = CONFIGS[case]

    line = refuse(capsys, code, str(run_yaml), *override.split())

    assert all(word in line for word in words), line
    assert not (cluster.folder / "runs").exists()


def test_a_model_that_cannot_be_read(
    cluster: Cluster, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut off, without blocks, without a tokenizer or with another model's: all are refused."""
    cut = Path(shutil.copytree(cluster.model, cluster.folder / "cut"))
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    mute = Path(shutil.copytree(cluster.model, cluster.folder / "mute"))
    for path in mute.glob("tokenizer*"):
        path.unlink()
    foreign = Path(shutil.copytree(cluster.model, cluster.folder / "foreign"))
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"word{n}": len(vocab) + n for n in range(40)}
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    shared = cluster.folder / "shared"
    config = AutoConfig.for_model(
        "albert",
        num_hidden_layers=5,
        num_hidden_groups=1,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        embedding_size=8,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(shared)
    task = ("task=sequence-classification", "label_names=[a, b]")

    cases = {
        cut: "cannot be read",
        mute: "no tokenizer",
        foreign: "tokenizer knows",
        shared: "no list of 5 blocks",
    }
    for folder, words in cases.items():
        more = task if folder == shared else ()
        line = refuse(capsys, 8, str(run_yaml), f"model={folder}", *more)
        assert words in line
        assert str(folder.name) in line or folder == shared
    assert not (cluster.folder / "runs").exists()


def test_evaluation_data_that_is_malformed(
    cluster: Cluster, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File and line are named before the run begins."""
    path = cluster.folder / "dev.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "cut\n')

    line = refuse(capsys, 7, str(run_yaml), f"evaluation.data.path={path}")

    assert "dev.jsonl:2" in line
    assert not (cluster.folder / "runs").exists()


def test_a_port_that_is_taken(
    cluster: Cluster, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The address is named; the coordinator that has it goes on."""
    serving = cluster.serve()

    line = refuse(capsys, 2, str(run_yaml), f"listen={cluster.address}")

    assert cluster.address in line
    assert "in use" in line
    assert not (cluster.folder / "runs" / "run" / "adapter").exists()
    serving.gateway.close()


def test_a_run_folder_that_cannot_be_written(
    cluster: Cluster, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the folder should be, and a name that is taken."""
    (cluster.folder / "file").write_text("")
    (cluster.folder / "runs" / "old" / "checkpoint-000006").mkdir(parents=True)

    assert "file" in refuse(capsys, 9, str(run_yaml), f"runs={cluster.folder / 'file'}")
    assert "resume" in refuse(capsys, 2, str(run_yaml), "name=old")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    cluster: Cluster, run_yaml: Path, capsys: pytest.CaptureFixture[str], small_disk: Path
) -> None:
    """The first checkpoint does not fit: one line, and nothing half-started stays."""
    capsys.readouterr()
    code = coordinator_main(["serve", "--config", str(run_yaml), f"runs={small_disk}", "name=x"])

    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 9
    assert last.startswith("coordinator: cannot write")
    assert "No space left on device" in last
    assert list(small_disk.iterdir()) == []


# ---- devices ----


def test_a_device_config_that_cannot_work(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown keys and bad values of a device are refused like the coordinator's."""
    config = write_yaml(
        cluster.folder / "a.yaml", {"coordinator": "tcp://127.0.0.1:1", "server_key": "?" * 40}
    )
    cases = {
        "patients_s=3": ("patients_s", "did you mean", "patience_s"),
        "chunk_bytes=0": ("chunk_bytes", "1048576"),
        "secret_key=absent.key": ("absent.key", "cannot read"),
        "server_key=absent.pub": ("absent.pub", "neither a public key"),
        "coordinator=nowhere": ("coordinator must be", "did you mean 'tcp://nowhere:7070'"),
    }
    key = f"secret_key={cluster.folder / 'a.key'}"
    for override, words in cases.items():
        code = edge_main(["run", "--config", str(config), key, override])
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert (code, len(lines)) == (2, 1), captured.err
        assert all(word in lines[0] for word in words), lines[0]


BAD_DATA: dict[str, tuple[str, str]] = {
    "empty": ("", "holds no rows"),
    "malformed": ('{"text": "fine"}\n{"text"\n', "bad.jsonl:2"),
    "mixed": ('{"text": "x y"}\n{"prompt": "x", "completion": "y"}\n', "bad.jsonl:2"),
    "too long": ('{"text": "fine"}\n' + json.dumps({"text": "x" * 70}) + "\n", "bad.jsonl:2"),
}


def test_bad_devices_hurt_nobody(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends with a typed error that says what is wrong; the others finish the run."""
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    (cluster.folder / "file").write_text("")
    ended: dict[str, EdgeError] = {}

    def fail(case: str, kind: type[EdgeError], *words: str, **settings: Any) -> None:
        with pytest.raises(kind) as caught:
            cluster.client("a", settings.pop("rows", None), **settings).run()
        ended[case] = caught.value
        text = errors.one_line(caught.value)
        assert all(word in text for word in words), text

    for case, (text, words) in BAD_DATA.items():
        path = cluster.folder / "bad.jsonl"
        path.write_text(text)
        fail(case, errors.DataError, words, data=DataConfig(path=str(path)))
    fine = sentences(1)
    other = save_model("llama", tmp_path_factory.mktemp("other"), seed=1)
    fail(
        "local model", errors.ModelError, "sha256", "leave `model` out", rows=fine, model=str(other)
    )
    fail("model hash", RefusedError, "model_hash", rows=fine, model_hash="0" * 64)
    fail("state", StorageError, "file", rows=fine, state=cluster.folder / "file")
    fail("cache", StorageError, "file", rows=fine, cache=cluster.folder / "file")
    create_key_pair(cluster.folder / "stranger.key")
    stranger = cluster.folder / "stranger.key"
    fail("unknown key", RefusedError, "register", rows=fine, secret_key=stranger)
    wrong = load_key_pair(stranger).public
    fail("server key", PeerGone, "wrong server key", rows=fine, server_key=wrong, patience_s=2.0)
    fail(
        "nobody",
        PeerGone,
        "nobody answers",
        rows=fine,
        coordinator="tcp://127.0.0.1:1",
        patience_s=0.5,
    )
    with monkeypatch.context() as patch:
        patch.setattr(participant, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        fail("version", RefusedError, "protocol version 2", "install edgesplit", rows=fine)
    assert [type(ended[n]).exit_code for n in ("empty", "local model", "state", "nobody")] == [
        7,
        8,
        9,
        3,
    ]

    clients = cluster.start("b", "c")
    assert serving.wait() == "completed"
    wait_all(clients)

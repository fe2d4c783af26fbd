"""What runs leave on disk is their owner's alone, on both sides and whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.export.run import export_run
from coordinator.results.run_folder import CONFIG
from edge_sdk.client.checkpoints import LocalState
from edge_sdk.config.describe import dump_config
from edge_sdk.files import make_private, private_files
from tests.e2e.cluster import Cluster, held_out, sentences, wait_all


@pytest.fixture
def lax() -> Iterator[None]:
    """A umask that keeps nothing from anybody."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    """What others than the owner may do something with."""
    found = [folder, *folder.rglob("*")]
    return sorted(str(p) for p in found if not p.is_symlink() and p.stat().st_mode & 0o077)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_state_run_folder_and_adapter_are_private(cluster: Cluster, lax: None) -> None:
    """After a run with checkpoints, held states and an export, others can read nothing of it."""
    serving = cluster.serve(cluster.config(rounds=1)).start()
    clients = [
        cluster.client(name, sentences(ord(name)), keep_held=True, data=held_out()).start()
        for name in cluster.names
    ]
    assert serving.wait() == "completed"
    wait_all(clients)
    serving.folder.write_text(CONFIG, dump_config(serving.config))
    out = cluster.folder / "exported"
    export_run(serving.folder, out)

    state = cluster.folder / "state"
    assert {path.name for path in (state / "run-1").iterdir()} == set(cluster.names)
    assert list(state.rglob("step-*.safetensors"))
    assert (out / "adapter_model.safetensors").is_file()
    for folder in (state, serving.folder.path, out):
        assert open_to_others(folder) == []


def test_state_of_an_earlier_version_becomes_private(tmp_path: Path, lax: None) -> None:
    """A folder that was left open is closed when it is used again, and no other one is."""
    folder = tmp_path / "state" / "run-1" / "a"
    folder.mkdir(parents=True)

    LocalState(folder).prepare()

    assert (
        stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    )
    assert stat.S_IMODE(folder.parents[1].stat().st_mode) == 0o777


def test_a_private_folder_has_private_ones_above_it(tmp_path: Path, lax: None) -> None:
    """All that is made on the way to it is private; a file in its place is an error."""
    make_private(tmp_path / "a" / "b")
    (tmp_path / "c").write_text("")

    assert open_to_others(tmp_path / "a") == []
    with pytest.raises(FileExistsError):
        make_private(tmp_path / "c")
    with private_files():
        (tmp_path / "d").write_text("")
    (tmp_path / "e").write_text("")
    assert [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in "de"] == [0o600, 0o666]

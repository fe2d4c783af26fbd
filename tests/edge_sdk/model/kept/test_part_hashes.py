"""Hashes of parts are kept while the files look the same, and found anew in every other case."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.errors import ModelError
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.kept.part_hashes import PartHashes
from edge_sdk.model.weights import ModelSource
from edge_sdk.protocol.plan import Part
from tests.damage import DAMAGES
from tests.tiny import CLASSES, make_config, make_model, task_of

WEIGHTS = "model.safetensors"


def later() -> float:
    """An hour from now: files of a moment ago are settled by then."""
    return time.time() + 3600.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny llama as transformers saves it."""
    made: Any = make_model(make_config("llama"), "causal-lm")
    made.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Counted(ModelSource):
    """A model that counts how often a part of it is read."""

    reads = 0

    def describe(self, part: str) -> Part:
        """Count, and read it."""
        self.reads += 1
        return super().describe(part)


def start(
    model: Path, kept: Path, clock: Callable[[], float] = later
) -> tuple[dict[str, Part], int]:
    """Describe every part as a new process does; return that, and how many were read."""
    source = Counted(str(model), "causal-lm")
    hashes = PartHashes(source, kept, clock)
    return {name: hashes.describe(name) for name in source.part_names()}, source.reads


def flip(path: Path, at: int = -1) -> None:
    """Change one byte in place, so that the file keeps its size and its inode."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def test_a_second_start_reads_nothing(model: Path, tmp_path: Path) -> None:
    """Parts are described as they were the first time, without opening their files again."""
    first, num_parts = start(model, tmp_path / "kept")

    second, reads = start(model, tmp_path / "kept")

    assert first == second
    assert (num_parts, reads) == (len(first), 0)


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_changed_file_of_the_same_size_is_noticed(
    model: Path, tmp_path: Path, *, keeps_time: bool
) -> None:
    """By the time of its content, and where that was set back by the time of its last change."""
    first, _ = start(model, tmp_path / "kept")
    before = (model / WEIGHTS).stat()
    flip(model / WEIGHTS)
    if keeps_time:
        os.utime(model / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))

    second, reads = start(model, tmp_path / "kept")

    after = (model / WEIGHTS).stat()
    assert (before.st_size, before.st_ino) == (after.st_size, after.st_ino)
    assert (before.st_mtime_ns == after.st_mtime_ns) == keeps_time
    assert reads == len(first)
    assert sum(first[name] != second[name] for name in first) == 1
    assert second == start(model, tmp_path / "other")[0]


def test_a_file_that_may_still_change_is_not_known_by_its_looks(
    model: Path, tmp_path: Path
) -> None:
    """One of a moment ago could be written again within the same tick of the file system."""
    start(model, tmp_path / "kept", time.time)

    _, reads = start(model, tmp_path / "kept", time.time)

    assert reads > 0


def test_what_changes_while_it_is_read_is_not_kept(model: Path, tmp_path: Path) -> None:
    """Hashes of a mixture of two files are forgotten."""
    source = Counted(str(model), "causal-lm")
    hashes = PartHashes(source, tmp_path / "kept", later)
    flip(model / WEIGHTS)
    hashes.describe("block.0")

    found, reads = start(model, tmp_path / "kept")

    assert reads == len(found)


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"missing", "a byte more"}))
def test_damaged_findings_are_found_anew(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """A file of hashes that was cut, emptied or overwritten is named, and mended."""
    first, _ = start(model, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    DAMAGES[damage](path)

    second, reads = start(model, tmp_path / "kept")

    assert first == second
    assert reads == len(first)
    assert "findings.damaged" in caplog.text


def test_a_hash_with_one_other_digit_is_not_believed(model: Path, tmp_path: Path) -> None:
    """Findings carry a hash of their own."""
    first, _ = start(model, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    kept = json.loads(path.read_text())
    sha256, _ = kept["values"]["parts"]["block.1"]
    kept["values"]["parts"]["block.1"][0] = f"{'1' if sha256[0] == '0' else '0'}{sha256[1:]}"
    path.write_text(json.dumps(kept))

    second, reads = start(model, tmp_path / "kept")

    assert first == second
    assert reads == len(first)


def test_another_config_or_file_of_the_tokenizer_counts(model: Path, tmp_path: Path) -> None:
    """What a part holds beside weights is looked at as well, files that were not there included."""
    start(model, tmp_path / "kept")
    (model / "vocab.txt").write_text("a\nb\n")

    found, reads = start(model, tmp_path / "kept")

    assert reads == len(found)
    assert found["files"] == ModelSource(str(model), "causal-lm").describe("files")


def test_a_drawn_head_is_not_kept(tmp_path: Path) -> None:
    """A head that comes from the seed is described anew each time; the blocks are not."""
    made: Any = make_model(make_config("bert"), task_of("bert"))
    made.bert.save_pretrained(tmp_path / "bert")
    found, reads = [], []
    for seed in (1, 1, 2):
        source = Counted(str(tmp_path / "bert"), task_of("bert"), num_labels=CLASSES)
        source.load_whole(seed)
        hashes = PartHashes(source, tmp_path / "kept", later)
        found.append({name: hashes.describe(name) for name in source.part_names()})
        reads.append(source.reads)

    assert reads == [len(found[0]), 1, 1]
    assert found[0] == found[1]
    assert found[1]["tail"] != found[2]["tail"]
    assert found[1]["block.0"] == found[2]["block.0"]


def test_a_part_that_became_another_is_not_served(model: Path, tmp_path: Path) -> None:
    """Who fills the cache from files that have changed since is told, and asks them anew."""
    source = Counted(str(model), "causal-lm")
    hashes = PartHashes(source, tmp_path / "kept", later)
    part = hashes.describe("block.3")
    other = ModelSource(str(model), "causal-lm").pack("block.2")

    with pytest.raises(ModelError, match="files have changed"):
        PartCache(tmp_path / "parts").store(part, other)
    hashes.forget()

    assert hashes.describe("block.3") == part
    assert source.reads == 2


def test_a_folder_that_cannot_be_written_costs_time_alone(model: Path, tmp_path: Path) -> None:
    """Without a place for hashes they are found at each start."""
    (tmp_path / "kept").write_text("a file")

    first, second = start(model, tmp_path / "kept"), start(model, tmp_path / "kept")

    assert first == second

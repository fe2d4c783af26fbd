"""Parts on disk are whole or not there, however they came and whoever else writes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_sdk.errors import ModelError, StorageError
from edge_sdk.model.kept import part_cache
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.weights import ModelSource
from edge_sdk.protocol.plan import Part
from tests.damage import DAMAGES


@pytest.fixture
def part(folder: Path) -> tuple[Part, bytes]:
    """A part and its bytes."""
    source = ModelSource(str(folder), "causal-lm")
    return source.describe("block.0"), source.pack("block.0")


def test_an_interrupted_download_goes_on(part: tuple[Part, bytes], tmp_path: Path) -> None:
    """What has arrived is kept across restarts, repeats do no harm, gaps are not written."""
    description, data = part
    first = PartCache(tmp_path)
    first.append(description, 0, data[:1000])
    second = PartCache(tmp_path)

    resumed_at = second.received(description)
    second.append(description, 0, data[:500])
    second.append(description, 5000, data[5000:6000])
    second.append(description, resumed_at, memoryview(data)[resumed_at:])
    was_there = second.has(description)
    path = second.finish(description)

    assert (resumed_at, was_there) == (1000, False)
    assert second.has(description)
    assert path.read_bytes() == data
    assert second.received(description) == 0


def test_damaged_bytes_are_refused(part: tuple[Part, bytes], tmp_path: Path) -> None:
    """A download with another hash is thrown away and can begin again."""
    description, data = part
    cache = PartCache(tmp_path)
    cache.append(description, 0, data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(ModelError, match="part 'block.0' arrived damaged"):
        cache.finish(description)

    assert not cache.has(description)
    assert cache.received(description) == 0
    cache.append(description, 0, data)
    assert cache.finish(description).read_bytes() == data


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"a folder"}))
def test_a_damaged_part_is_noticed_before_it_is_used(
    part: tuple[Part, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """A process that finds it so, or in which it becomes so, names it and fetches it again."""
    description, data = part
    first = PartCache(tmp_path)
    path = first.store(description, data)
    assert first.has(description)
    DAMAGES[damage](path)

    assert not PartCache(tmp_path).has(description)
    assert not first.has(description)

    assert ("part.damaged" in caplog.text) == (damage != "missing")
    assert first.store(description, data).read_bytes() == data
    assert first.has(description)
    assert PartCache(tmp_path).has(description)


def test_a_whole_part_is_read_once_in_a_process(
    part: tuple[Part, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is not computed again while the file is the same."""
    description, data = part
    PartCache(tmp_path).store(description, data)
    cache = PartCache(tmp_path)
    assert cache.has(description)

    monkeypatch.setattr(part_cache, "_digest", None)

    assert cache.has(description)


def test_devices_of_one_machine_fetch_a_part_at_once(
    part: tuple[Part, bytes], tmp_path: Path
) -> None:
    """Each ends with the whole part, whoever finishes it first."""
    description, data = part

    def fetch(folder: Path) -> bytes:
        cache = PartCache(folder)
        while not cache.has(description):
            offset = cache.received(description)
            if offset < description.num_bytes:
                cache.append(description, offset, data[offset : offset + len(data) // 8])
                continue
            cache.finish(description)
        return cache.path(description).read_bytes()

    with ThreadPoolExecutor(4) as pool:
        for turn in range(50):
            assert set(pool.map(fetch, [tmp_path / str(turn)] * 4)) == {data}


def test_a_cache_that_cannot_be_written_is_a_storage_error(
    part: tuple[Part, bytes], tmp_path: Path
) -> None:
    """A file in the folder's place: one line, exit code 9."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="cannot write part 'block.0'") as caught:
        PartCache(tmp_path / "file").append(part[0], 0, part[1])

    assert caught.value.exit_code == 9


def test_the_cache_lies_where_caches_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CACHE_HOME is respected."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert PartCache().folder == tmp_path / "edgesplit" / "parts"


def test_a_part_that_is_written_as_another_is_none(
    part: tuple[Part, bytes], tmp_path: Path
) -> None:
    """What does not have the part's hash is refused when it is written, and leaves nothing."""
    description, data = part
    cache = PartCache(tmp_path)

    with pytest.raises(ModelError, match="'block.0' is no longer what it was"):
        cache.store(description, data[:-1] + bytes([data[-1] ^ 1]))

    assert list(tmp_path.iterdir()) == []
    assert not cache.has(description)

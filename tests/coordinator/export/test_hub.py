"""A result is pushed to a hub whole, private unless it is asked otherwise, or one line says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from coordinator.export.hub import check_push, push
from edge_sdk.errors import ConfigError, TransportError
from tests.coordinator.export.fake_hub import TOKEN, FakeHub, fake_hub

# The hub's client asks httpx for something that has another name now; nothing of ours is concerned.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub to which we have a token."""
    with fake_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Something exported: a small file and a large one."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n\n# Card\n")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    return folder


@pytest.mark.parametrize("public", [False, True])
def test_all_files_arrive(hub: FakeHub, result: Path, public: bool) -> None:
    """Byte for byte, in a repository that only its owner sees unless it is to be public."""
    check_push("me/mine")

    address = push(result, "me/mine", public=public)

    assert address == f"{hub.address}/me/mine"
    assert hub.files == {path.name: path.read_bytes() for path in result.iterdir()}
    assert hub.private == {"me/mine": not public}


def test_a_hub_that_refuses_is_one_line(hub: FakeHub, result: Path) -> None:
    """The result is there, and the line says so."""
    hub.refuses = True

    with pytest.raises(TransportError, match=f"{result} is written, but not pushed") as error:
        push(result, "me/mine", public=False)

    assert "\n" not in str(error.value)
    assert error.value.exit_code == 3


def test_what_cannot_be_pushed_is_said_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An id that is none, no token, no hub: each is a line with what to do."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    with pytest.raises(ConfigError, match="--push-to-hub: .*no spaces here"):
        check_push("no spaces here")
    with pytest.raises(ConfigError, match="`hf auth login`, or set HF_TOKEN"):
        check_push("me/mine")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_push("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_push("me/mine")

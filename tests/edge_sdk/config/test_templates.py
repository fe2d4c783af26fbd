"""`edge-sdk init` and `coordinator init`: commented configs that load, and that lose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import coordinator.cli
import coordinator.commands.init
import edge_sdk.cli
import edge_sdk.enrol
from coordinator.config.run import ServeConfig
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.config.templates import filled

Main = Callable[[Sequence[str]], int]
ROOT = Path(__file__).parents[3]
KEY = "{" + "k" * 39
PROGRAMS: dict[str, tuple[Main, Path, type, list[str], dict[str, Any]]] = {
    "device.yaml": (
        edge_sdk.cli.main,
        edge_sdk.enrol.TEMPLATE,
        ClientConfig,
        ["--coordinator", "tcp://10.0.0.1:80", "--server-key", KEY],
        {"coordinator": "tcp://10.0.0.1:80", "server_key": KEY},
    ),
    "coordinator.yaml": (
        coordinator.cli.main,
        coordinator.commands.init.TEMPLATE,
        ServeConfig,
        ["--model", "some/model", "--listen", "tcp://127.0.0.1:80"],
        {"model": "some/model", "listen": "tcp://127.0.0.1:80"},
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_init_writes_is_the_example(name: str, tmp_path: Path) -> None:
    """Comment by comment, with the name of the file that it is; and it loads."""
    main, template, kind, _, _ = PROGRAMS[name]
    file = tmp_path / "new.yaml"

    assert main(["init", str(file)]) == 0

    example = ROOT / "examples" / name
    assert template.read_text("utf-8") == example.read_text("utf-8")
    assert file.read_text("utf-8") == example.read_text("utf-8").replace(
        f"examples/{name}", str(file)
    )
    assert load_config(kind, file, env={}) is not None


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_known_already_is_filled_in(name: str, tmp_path: Path) -> None:
    """Quoted where YAML needs it; every other value is that of the example."""
    main, _, kind, words, values = PROGRAMS[name]

    assert main(["init", str(tmp_path / "a.yaml")]) == 0
    assert main(["init", str(tmp_path / "b.yaml"), *words]) == 0

    plain, given = (load_config(kind, tmp_path / file, env={}) for file in ("a.yaml", "b.yaml"))
    assert given == replace(plain, **values)


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_overwritten_and_nothing_wrong_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is there stays as it is; a wrong value leaves none behind."""
    main, _, _, _, _ = PROGRAMS[name]
    option = "--coordinator" if name == "device.yaml" else "--listen"
    (tmp_path / "mine.yaml").write_text("mine", "utf-8")

    assert main(["init", str(tmp_path / "mine.yaml")]) == 9
    assert main(["init", str(tmp_path / "new.yaml"), option, "10.0.0.1:80"]) == 2

    assert (tmp_path / "mine.yaml").read_text("utf-8") == "mine"
    assert not (tmp_path / "new.yaml").exists()
    assert "did you mean 'tcp://10.0.0.1:80'?" in capsys.readouterr().err


def test_a_key_that_a_template_lacks_is_our_mistake() -> None:
    """It is not silently left out."""
    with pytest.raises(KeyError):
        filled("a: 1\n", {"b": "2"})

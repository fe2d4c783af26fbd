"""`coordinator serve`: what it says before it waits for anybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.commands.serve import say_who_may_come
from coordinator.config.run import ServeConfig
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.transport.keys import make_key_pair


@pytest.mark.parametrize(
    ("num_devices", "least", "words"),
    [(0, 1, "no device is registered in "), (1, 2, "1 device is "), (2, 3, "2 devices are ")],
)
def test_a_list_of_too_few_devices_is_told(
    num_devices: int, least: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is named, and the command that mends it; with enough devices nothing is said."""
    config = ServeConfig(model="x", allow_list=tmp_path / "devices.yaml", min_devices=least)
    for number in range(num_devices):
        AllowList(config.allow_list).register(f"d{number}", make_key_pair().public)

    say_who_may_come(config)
    line = capsys.readouterr().err
    AllowList(config.allow_list).register("last", make_key_pair().public)
    say_who_may_come(config)

    assert line.startswith(f"coordinator: {words}")
    assert f"--allow-list {config.allow_list}" in line
    assert capsys.readouterr().err == ""

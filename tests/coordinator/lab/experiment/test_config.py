"""The file of an experiment: what it comes to, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.lab.experiment.config import (
    ExperimentConfig,
    cores,
    link_shape,
    load_experiment,
    memory_bytes,
    needs_relay,
)
from coordinator.lab.simulation.boards import GIB, catalogue
from edge_sdk.errors import ConfigError

BOARDS: dict[str, Any] = {
    "a": {"emulated": "agx-orin-32gb", "link": "lan-1g"},
    "b": {"emulated": "orin-nano-8gb", "link": "4g-good", "jitter_ms": 15},
    "c": {"ssh": "me@board"},
}


def load(tmp_path: Path, **settings: Any) -> dict[str, ExperimentConfig]:
    """Load an experiment on `BOARDS` with *settings*."""
    path = tmp_path / "experiment.yaml"
    path.write_text(json.dumps({"model": "m", "boards": BOARDS, **settings}), encoding="utf-8")
    return load_experiment(path, env={})[1]


def test_emulated_boards_are_as_their_data_sheets_say(tmp_path: Path) -> None:
    """Memory is the board's, cores are in proportion of the peaks, links are the catalogue's."""
    config = load(tmp_path, experiment={"cores": 0.8})["run"]
    sheets = catalogue().boards

    assert memory_bytes(config, "b") == (8 - sheets["orin-nano-8gb"].system_gib) * GIB
    ratio = sheets["orin-nano-8gb"].tflops / sheets["agx-orin-32gb"].tflops
    assert cores(config) == {"a": 0.8, "b": pytest.approx(0.8 * ratio)}
    shape = link_shape(config, "4g-good", 15.0)
    assert (shape.up_bytes_per_s, shape.down_bytes_per_s) == (10e6 / 8, 40e6 / 8)
    assert (shape.delay_s, shape.jitter_s) == (0.0275, 0.015)
    assert [needs_relay(config, name) for name in "abc"] == [True, True, False]


def test_a_real_board_has_a_relay_only_where_its_link_is_changed(tmp_path: Path) -> None:
    """Otherwise the board dials the coordinator itself."""
    faults = [{"board": "c", "do": "cut", "seconds": 5, "at_s": 1}]

    assert needs_relay(load(tmp_path, faults=faults)["run"], "c")


def test_own_boards_and_limits_win(tmp_path: Path) -> None:
    """Boards and links of the file, memory and cores by hand."""
    own = {"memory_gib": 2, "tflops": 0.1, "watts": 5}
    boards = {
        "x": {"emulated": "toy", "link": "tin", "memory_bytes": 5e8, "cpu_quota": 0.25},
    }
    section = {
        "boards": {"toy": own},
        "links": {"tin": {"down_mbit": 8, "up_mbit": 4, "rtt_ms": 100}},
    }
    config = load(tmp_path, boards=boards, experiment=section)["run"]

    assert (memory_bytes(config, "x"), cores(config)) == (5e8, {"x": 0.25})
    assert link_shape(config, "tin", 0.0).up_bytes_per_s == 5e5


def test_methods_are_presets_and_settings(tmp_path: Path) -> None:
    """Each method is the file over its preset; the run waits for all boards at first."""
    section = {
        "presets": ["splitlora", "deep"],
        "methods": {"deep": {"settings": ["default.split=3"]}},
    }
    methods = load(tmp_path, experiment=section, min_devices=2)

    assert list(methods) == ["splitlora", "deep"]
    assert methods["splitlora"].aggregation == "fedavg"
    assert methods["deep"].default.split == 3
    assert methods["deep"].serve_config().min_devices == 3
    assert methods["deep"].min_devices == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"boards": {}}, "boards must name at least 1 board"),
        ({"boards": {"a b": {"ssh": "x"}}}, "'a b' is no name"),
        ({"boards": {"a": {}}}, "give ssh or emulated, one of them"),
        ({"boards": {"a": {"ssh": "x", "emulated": "y"}}}, "give ssh or emulated"),
        ({"boards": {"a": {"ssh": "x", "cpu_quota": 1}}}, "cpu_quota means nothing to an ssh"),
        ({"boards": {"a": {"emulated": "agx-orin-32gb", "port": 1}}}, "port means nothing"),
        *(
            ({"boards": {"a": {"emulated": "agx-orin-32gb", key: value}}}, f"{key} means nothing")
            for key, value in {
                "ssh_options": ["-4"],
                "workdir": "x",
                "extras": [],
                "packages": ["x"],
            }.items()
        ),
        (
            {"boards": {"a": {"ssh": "x"}, "b": {"ssh": "x", "workdir": "./edgesplit/"}}},
            "a and b are both in './edgesplit/' of x",
        ),
        ({"boards": {"a": {"emulated": "toaster"}}}, "emulated 'toaster' is unknown; there are"),
        ({"boards": {"a": {"ssh": "x", "link": "string"}}}, "link 'string' is unknown"),
        (
            {
                "boards": {"a": {"ssh": "x"}, "b": {"emulated": "agx-orin-32gb"}},
                "experiment": {"network": "namespaces"},
                "listen": "tcp://192.0.2.1:7070",
            },
            "boards in namespaces cannot reach it",
        ),
        ({"min_devices": 4}, "min_devices is 4, boards are 3"),
        ({"faults": [{"board": "z", "do": "kill", "at_s": 1}]}, "there is no board 'z'"),
        ({"faults": [{"board": "a", "do": "kill"}]}, "give at_s or at_step"),
        ({"faults": [{"board": "a", "do": "cut", "at_s": 1}]}, "seconds is missing"),
        ({"faults": [{"board": "a", "do": "link", "at_s": 1}]}, "to is missing"),
        ({"faults": [{"board": "a", "do": "throttle", "at_s": 1}]}, "factor is missing"),
        (
            {"faults": [{"board": "a", "do": "throttle", "factor": 1.5, "at_s": 1}]},
            "factor must be at most 1",
        ),
        (
            {
                "faults": [{"board": "a", "do": "throttle", "factor": 0.5, "at_s": 1}],
                "experiment": {"must_limit": False},
            },
            "a cannot be throttled without limits",
        ),
        *(
            (
                {
                    "experiment": {
                        "presets": ["x"],
                        "methods": {"x": {"preset": "splitlora", "settings": [told]}},
                    }
                },
                f"x changes {told.split('.')[0].split('=')[0]}, which all methods share",
            )
            for told in ("boards.a.link=null", "experiment.cores=0.5")
        ),
        (
            {"faults": [{"board": "c", "do": "throttle", "factor": 1, "at_s": 1}]},
            "c is an ssh board, whose speed is its own",
        ),
        ({"faults": [{"board": "a", "do": "link", "to": "?", "at_s": 1}]}, "'?' is unknown"),
        ({"experiment": {"presets": ["nope"]}}, "'nope' is unknown"),
        ({"experiment": {"presets": ["ft"]}}, "ft trains without boards"),
        ({"experiment": {"restarts": -1}}, "restarts must be at least 0"),
        ({"experiment": {"cores": 0}}, "cores must be above 0"),
        ({"preset": "splitlora", "experiment": {"presets": ["hetlora"]}}, "preset: name it in"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    """One line that names the key."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **settings)

    assert words in str(caught.value)
    assert "\n" not in str(caught.value)

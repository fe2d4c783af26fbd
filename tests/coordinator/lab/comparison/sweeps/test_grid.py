"""Sweeps: every combination of the values that were asked for, each with a folder of its own."""

from __future__ import annotations

import pytest

from coordinator.config.run import ServeConfig
from coordinator.lab.comparison.sweeps.grid import SweptKey, grid, read_sweep
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError


def test_values_are_read_as_in_a_config() -> None:
    """Numbers, also as 1e-3; words, truth and nothing."""
    assert read_sweep("simulation.alpha=0.1,0.5,5") == ("simulation.alpha", (0.1, 0.5, 5))
    assert read_sweep("training.learning_rate=1e-3, 2e-3").values == (1e-3, 2e-3)
    words = read_sweep("aggregation=exact,svd")
    assert (words.name, words.values, words.is_numeric) == ("aggregation", ("exact", "svd"), False)
    assert read_sweep("max_rank=null,4").values == (None, 4)
    assert not read_sweep("x=true,false").is_numeric


def test_several_sweeps_make_a_grid() -> None:
    """The last one moves first; overrides, names and folders say which point it is."""
    sweeps = [read_sweep("simulation.alpha=0.1,5"), read_sweep("model=a/b,null")]

    points = grid(sweeps)

    assert [point.overrides for point in points] == [
        ["simulation.alpha=0.1", 'model="a/b"'],
        ["simulation.alpha=0.1", "model=null"],
        ["simulation.alpha=5", 'model="a/b"'],
        ["simulation.alpha=5", "model=null"],
    ]
    assert points[0].name == "alpha 0.1, model a/b"
    assert points[0].folder == "alpha=0.1,model=a_b"
    assert points[0].without("model") == ((sweeps[0], 0.1),)
    (alone,) = grid([])
    assert (alone.overrides, alone.folder, alone.name) == ([], "", "")


def test_an_override_gives_the_config_its_value() -> None:
    """As if it stood in the file: 1e-3 is a number there, too."""
    (point, _) = grid([read_sweep("training.learning_rate=1e-3,0.1")])

    loaded = load_config(ServeConfig, None, ["model=m", *point.overrides], {})

    assert loaded.training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("alpha", "must be KEY=VALUE,VALUE"),
        ("alpha=1", "of at least 2 values"),
        ("=1,2", "must be KEY=VALUE,VALUE"),
        ("alpha=[1", "must be KEY=VALUE,VALUE"),
        ("alpha=[1],[2]", "must have plain values"),
        ("alpha=1,1.0", "must have different values"),
    ],
)
def test_what_is_no_sweep_is_refused(text: str, error: str) -> None:
    """In one line that says the form."""
    with pytest.raises(ConfigError, match=error):
        read_sweep(text)


def test_a_grid_that_would_write_into_one_folder_is_refused() -> None:
    """A key that is swept twice, and values that no folder's name tells apart."""
    with pytest.raises(ConfigError, match="a key must be swept once"):
        grid([SweptKey("a", (1, 2)), SweptKey("a", (3, 4))])
    with pytest.raises(ConfigError, match="values differ in nothing"):
        grid([SweptKey("a", ("x/y", "x:y"))])

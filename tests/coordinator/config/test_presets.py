"""A preset fills in what its method says, yields to the user, and refuses to be another method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.config.presets import NAMES, load_serve_config, preset_text, preset_title
from coordinator.config.run import DeviceSettings, ServeConfig
from coordinator.planning.fixed import check_config, plan_device
from edge_sdk.config.describe import dump_config
from edge_sdk.config.loader import load_config
from edge_sdk.errors import ConfigError
from edge_sdk.lora.targets import ModelFacts, find_targets
from tests.e2e.cluster import Cluster, save_model, wait_all
from tests.tiny import BLOCKS, layout_of, make_config

# Split of a device, aggregation, who sees the labels, who trains what: as in docs/presets.md.
TABLE: dict[str, tuple[Any, ...]] = {
    "hsplitlora": ("armsc", "fedex", "device", "devices", "adapters"),
    "splitlora": (3, "fedavg", "server", "devices", "adapters"),
    "hlora": (BLOCKS, "svd", "device", "devices", "adapters"),
    "hetlora": (BLOCKS, "zeropad", "device", "devices", "adapters"),
    "fedlora": (BLOCKS, "fedavg", "device", "devices", "adapters"),
    "cenlora": (None, "fedex", "device", "coordinator", "adapters"),
    "ft": (None, "fedex", "device", "coordinator", "all"),
}


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    """A Llama of five blocks."""
    config, layout = make_config("llama"), layout_of("llama")
    targets = find_targets(config, "causal-lm", layout, ServeConfig(model="m").lora)
    return ModelFacts(layout, targets)


def load(*overrides: str, preset: str | None = None, file: Path | None = None) -> ServeConfig:
    """A config of no particular model, without this machine's environment."""
    return load_serve_config(file, ["model=m", *overrides], {}, preset=preset)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_its_method(name: str, facts: ModelFacts) -> None:
    """It resolves to a config that a model of five blocks can be trained with."""
    split, *rest = TABLE[name]

    config = load(preset=name)

    assert [config.aggregation, config.labels, config.trained_by, config.pooled.trains] == rest
    assert config.preset == name
    check_config(config, facts)
    if split == "armsc":
        assert (config.planning.split, config.planning.ranks) == ("armsc", "rngwp")
    elif split is not None:
        plan = plan_device(config, facts, "anybody")
        assert plan.split == split
        assert plan.tail is (config.labels == "device")
        assert set(plan.ranks) == set(facts.weights(0, split))


def test_every_preset_has_a_file_and_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    """The names of the config, the files and the list are the same."""
    assert list(TABLE) == list(NAMES)

    assert main(["presets", "list", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {n: preset_title(n) for n in NAMES}
    assert main(["presets", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)
    assert main(["presets", "show", "hlora"]) == 0
    assert capsys.readouterr().out == preset_text("hlora")
    assert main(["presets", "show", "nonsense"]) == 2
    assert "there is no preset 'nonsense'; there are hsplitlora" in capsys.readouterr().err


def test_the_user_s_own_settings_win(tmp_path: Path) -> None:
    """File, environment and flags lie over the preset; a group that it touches keeps its rest."""
    file = tmp_path / "run.yaml"
    file.write_text("preset: hlora\nmodel: m\ndefault: {batch_size: 5}\ndevices: {a: {r: 2}}\n")
    env = {"COORDINATOR_LORA__R": "6", "SOMETHING_ELSE": "1"}

    config = load_serve_config(file, ["rounds=3"], env)

    assert config.settings("a") == DeviceSettings(
        split="all", r=2, batch_size=5, codec="bfloat16", in_flight=2, residual="auto"
    )
    assert (config.settings("b").r, config.rounds, config.aggregation) == (6, 3, "svd")


def test_a_flag_beats_the_file(tmp_path: Path) -> None:
    """`--preset` replaces the file's preset as a whole; null means none."""
    file = tmp_path / "run.yaml"
    file.write_text("preset: hlora\nmodel: m\n")

    assert load(file=file, preset="fedlora").aggregation == "fedavg"
    assert load("preset=null", file=file) == load_serve_config(None, ["model=m"], {})
    assert load("preset=splitlora", file=file).labels == "server"


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("hsplitlora", ["aggregation=stack", "labels=server", "planning.split=memory"]),
        ("splitlora", ["default.split=2", "devices.a.split=1", "aggregation=fedavg"]),
        ("hlora", ["planning.ranks=uniform", "devices.a.split=all", "devices.a.r=3"]),
        ("hetlora", ["planning.ranks=uniform", "default.split=all"]),
        ("ft", ["training.learning_rate=1e-3", "pooled.batch_size=4"]),
    ],
)
def test_what_the_method_leaves_open_is_the_user_s(preset: str, settings: list[str]) -> None:
    """Other readings of a method, and what it does not say, are no contradiction."""
    assert load(*settings, preset=preset).preset == preset


@pytest.mark.parametrize(
    ("preset", "setting", "message"),
    [
        ("hlora", "aggregation=exact", "aggregation must be 'svd' or 'svd-balanced' with preset"),
        ("hlora", "default.split=2", "default.split must be 'all' with preset 'hlora', got 2"),
        ("hlora", "default={split: 2}", "override default: default.split must be 'all' with"),
        ("hlora", "devices.a.split=2", "override devices.a.split: devices.a.split must be 'all'"),
        ("hlora", "planning.ranks=rngwp", "planning.ranks must be 'fixed' or 'uniform' with"),
        ("hetlora", "labels=server", "labels must be 'device' with preset 'hetlora', got 'server'"),
        ("fedlora", "planning.ranks=uniform", "planning.ranks must be 'fixed' with preset"),
        ("splitlora", "labels=device", "labels must be 'server' with preset 'splitlora'"),
        ("splitlora", "devices.a.split=all", "devices.a.split must not be 'all' with preset"),
        (
            "hsplitlora",
            "aggregation=fedavg",
            "aggregation must be 'fedex' or 'exact' or 'stack' with preset",
        ),
        ("cenlora", "pooled.trains=all", "pooled.trains must be 'adapters' with preset 'cenlora'"),
        ("ft", "trained_by=devices", "trained_by must be 'coordinator' with preset 'ft'"),
        ("hlra", "rounds=3", "preset must be .* got 'hlra'; did you mean 'hlora'"),
    ],
)
def test_a_contradiction_is_one_clear_line(preset: str, setting: str, message: str) -> None:
    """The line names the key, what the method allows, and what was given."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(setting, preset=preset)

    assert "\n" not in str(caught.value)


def test_a_contradiction_names_its_line(tmp_path: Path) -> None:
    """Where the file says it, file and line; a key that is missing is not blamed on the preset."""
    file = tmp_path / "run.yaml"
    file.write_text("model: m\npreset: hlora\n\naggregation: exact\n")
    with pytest.raises(ConfigError, match=r"run.yaml:4: aggregation must be .*; leave it out or"):
        load_serve_config(file, (), {})

    file.write_text("preset: hlora\n")
    with pytest.raises(ConfigError, match=r"run.yaml(:1)?: model is missing"):
        load_serve_config(file, (), {})


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_config_needs_no_preset(name: str, tmp_path: Path) -> None:
    """What a run folder keeps loads to the same config without the preset's file."""
    config = load(preset=name)
    kept = tmp_path / "config.resolved.yaml"
    kept.write_text(dump_config(config))

    bare = load_config(ServeConfig, kept, env={})
    kept.write_text(kept.read_text().replace(f"preset: {name}\n", ""))
    nameless = load_config(ServeConfig, kept, env={})

    assert bare.settings("x") == config.settings("x")
    assert (bare.preset, nameless.preset) == (name, None)
    for field in ("planning", "aggregation", "labels", "trained_by", "pooled", "training"):
        assert getattr(bare, field) == getattr(nameless, field) == getattr(config, field)


def test_split_all_needs_no_coordinator_s_compute(tmp_path: Path) -> None:
    """HLoRA between real devices of ranks 2 and 4: all blocks on each, and dW is learned."""
    model = save_model("llama", tmp_path / "model")
    cluster = Cluster(tmp_path, model, tmp_path / "parts", names=("a", "b"))
    settings = [f"model={model}", "default.batch_size=4", "devices={a: {r: 2}, b: {r: 4}}"]
    preset = load_serve_config(None, settings, {}, preset="hlora")
    config = cluster.config(
        preset=preset.preset,
        aggregation=preset.aggregation,
        labels=preset.labels,
        default=preset.default,
        devices=preset.devices,
    )
    try:
        serving = cluster.serve(config).start()
        clients = cluster.start()
        assert serving.wait() == "completed"
        wait_all(clients)
    finally:
        cluster.close()

    assert {n: p.split for n, p in serving.admission.plans.items()} == {"a": BLOCKS, "b": BLOCKS}
    assert {r for p in serving.admission.plans.values() for r in p.ranks.values()} == {2, 4}
    assert not serving.coordinator.learned.engine.ranks
    assert serving.ledger.global_factors().keys() == serving.model.facts.targets.keys()
    assert serving.rows[-1]["train_loss"] < serving.rows[1]["train_loss"]

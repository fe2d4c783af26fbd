"""Configuration: layers, types, and errors that say what to mend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.config.describe import dump_config
from edge_sdk.config.loader import SECRET, load_config
from edge_sdk.config.sources import read_file
from edge_sdk.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How one round trains."""

    steps: int = 100
    lr: float = 1e-3
    labels: Literal["server", "device"] = "device"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One simulated device."""

    memory_gib: float
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Every kind of field there is."""

    model: str = "gpt2"
    revision: str | None = None
    debug: bool = False
    data: Path | None = None
    token: str = field(default="", metadata=SECRET)
    ranks: tuple[int, ...] = (4, 8)
    port: int | Literal["auto"] = "auto"
    weights: dict[str, float] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)
    training: Training = Training(steps=50)
    extra: Training | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Needy:
    """A required field two levels down."""

    device: Device


def load(
    tmp_path: Path, text: str = "", *overrides: str, env: dict[str, str] | None = None
) -> Whole:
    """Load `Whole` from a file with *text*."""
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(Whole, file, overrides, env or {})


def complaint(tmp_path: Path, text: str = "", *overrides: str, **env: str) -> str:
    """Return the error that loading ends with, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides, env=env)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{tmp_path}/", "")


def test_without_any_source_the_defaults_stand() -> None:
    """No file, no environment, no override: the dataclass as it is."""
    assert load_config(Whole, env={}) == Whole()


def test_a_later_source_wins(tmp_path: Path) -> None:
    """Defaults yield to the file, the file to the environment, that to an override."""
    text = "model: file\nrevision: file\ntraining: {labels: server, steps: 7}\n"
    env = {"EDGE_SDK_REVISION": "env", "EDGE_SDK_TRAINING__STEPS": "8", "OTHER_MODEL": "x"}

    config = load(tmp_path, text, "training.steps=9", env=env)

    assert (config.model, config.revision, config.debug) == ("file", "env", False)
    assert config.training == Training(steps=9, labels="server")


def test_a_groups_own_default_is_the_base_of_what_is_left_open(tmp_path: Path) -> None:
    """Changing one key of a group keeps the outer class's defaults of the other keys."""
    assert load(tmp_path, "training: {lr: 2}").training == Training(steps=50, lr=2.0)


def test_every_kind_of_field_is_read(tmp_path: Path) -> None:
    """All supported annotations come out as the types they name."""
    text = """
    revision: null
    debug: true
    data: train.jsonl
    ranks: [1, 2]
    port: 80
    weights: {h.0.attn: 1, h.1.attn: 0.5}
    devices: {nano: {memory_gib: 4, tags: [slow]}}
    extra: {lr: 1e-4}
    """

    config = load(tmp_path, text)

    assert config == Whole(
        debug=True,
        data=tmp_path / "train.jsonl",
        ranks=(1, 2),
        port=80,
        weights={"h.0.attn": 1.0, "h.1.attn": 0.5},
        devices={"nano": Device(memory_gib=4.0, tags=("slow",))},
        extra=Training(lr=1e-4),
    )
    assert type(config.weights["h.0.attn"]) is float


def test_plain_scalars_mean_what_they_look_like(tmp_path: Path) -> None:
    """Norway, dates and clock times stay text; 1e-4 is a number."""
    text = "model: no\nrevision: 2026-01-01\ntraining: {lr: 1e-4}\nextra: {lr: +2.5E3}"

    config = load(tmp_path, text)

    assert (config.model, config.revision, config.training.lr) == ("no", "2026-01-01", 1e-4)
    assert config.extra == Training(lr=2500.0)


def test_text_from_a_shell_needs_no_quotes(tmp_path: Path) -> None:
    """A text field takes what was typed, whatever YAML would make of it; quotes are removed."""
    for typed in ("5", "null", "{instruction}", "a: b", "[x", "*star", "pass #1"):
        assert load(tmp_path, "", f"model={typed}").model == typed

    assert load(tmp_path, "", "model='5'").model == "5"
    assert load(tmp_path, "", "revision=null", env={"EDGE_SDK_REVISION": "a"}).revision is None
    assert load(tmp_path, "", "ranks=[3]", "weights={a.b: 2}").weights == {"a.b": 2.0}


def test_mappings_are_laid_over_each_other(tmp_path: Path) -> None:
    """An override changes one entry of a mapping and keeps the file's others."""
    text = "devices: {a: {memory_gib: 4}, b: {memory_gib: 8}}"

    config = load(tmp_path, text, "devices.a.memory_gib=2", "devices.c={memory_gib: 1}")

    assert {name: device.memory_gib for name, device in config.devices.items()} == {
        "a": 2.0,
        "b": 8.0,
        "c": 1.0,
    }


def test_null_wipes_out_what_weaker_layers_said(tmp_path: Path) -> None:
    """A group set to null is gone, and can be begun afresh."""
    assert load(tmp_path, "extra: {steps: 3}", "extra=null").extra is None
    assert load(tmp_path, "extra: {steps: 3}", "extra=null", "extra.lr=1").extra == Training(lr=1)


def test_relative_paths_start_where_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's path starts from the file's folder, a typed one from the current folder."""
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/somebody")

    assert load(tmp_path, "data: ../x").data == tmp_path / "../x"
    assert load(tmp_path, "data: /x").data == Path("/x")
    assert load(tmp_path, "data: ~/x").data == Path("/home/somebody/x")
    assert load(tmp_path, "", "data=x").data == Path("x")


def test_reserved_variables_are_left_alone() -> None:
    """Names in `ignore` are no settings; every other name with the prefix must be one."""
    env = {"EDGE_SDK_CONFIG": "run.yaml"}

    assert load_config(Whole, env=env, ignore={"EDGE_SDK_CONFIG"}) == Whole()
    with pytest.raises(ConfigError, match="EDGE_SDK_CONFIG: unknown key 'config'"):
        load_config(Whole, env=env)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: x", "run.yaml:1: unknown key 'modle'; did you mean 'model'?"),
        ("\ntraining:\n  setps: 1", "run.yaml:3: unknown key 'training.setps'; did you mean"),
        ("training: {zzz: 1}", "unknown key 'training.zzz'; the keys here are steps, lr, labels"),
        ("model: 5", "run.yaml:1: model must be text, got 5"),
        ("model: null", "run.yaml:1: model must be text, got null"),
        ("debug: yes", "debug must be true or false, got 'yes'"),
        ("debug: 1", "debug must be true or false, got 1"),
        ("training: {steps: 1.0}", "training.steps must be an integer, got 1.0"),
        ("training: {steps: true}", "training.steps must be an integer, got true"),
        ("training: {steps: 010}", "training.steps must be an integer, got '010'"),
        ("training: {lr: .nan}", "training.lr must be a number, got nan"),
        ("training: {lr: [1]}", "training.lr must be a number, got a list of 1"),
        (f"training: {{lr: 1{'0' * 400}}}", "training.lr must be a number, got 1000"),
        ("training: {labels: sever}", "must be 'server' or 'device', got 'sever'; did you mean 's"),
        ("training: 5", "run.yaml:1: training must be a group of keys, got 5"),
        ("ranks: 4", "ranks must be a list, each an integer, got 4"),
        ("ranks: [4, x]", "run.yaml:1: ranks[1] must be an integer, got 'x'"),
        ("port: x", "port must be an integer or 'auto', got 'x'"),
        ("weights: [1]", "weights must be a mapping, each value a number, got a list of 1"),
        ("data: ''", "data must be a path, got ''"),
        ("devices: {a: {memory_gib: big}}", "devices.a.memory_gib must be a number, got 'big'"),
        ("devices: {a: {}}", "run.yaml:1: devices.a.memory_gib is missing; it must be a number"),
        ("model: a\ndebug: true\nmodel: b", "run.yaml:3: key 'model' is given twice, first at run"),
        ("model: [a", "run.yaml:1: not valid YAML"),
        ("a: 1\n b: 2", "run.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("model: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        ("--- 1\n--- 2", "not valid YAML"),
        ("- 1", "run.yaml: must hold `key: value` pairs at the top level"),
        ("? [a]\n: 1", "run.yaml:1: a key must be plain text"),
        ("training: &t {lr: *t}", "run.yaml: nested too deeply, or an alias within its own"),
        ("\x07", "not valid YAML"),
        (f"port: {'9' * 5000}", "run.yaml: Exceeds the limit"),
    ],
)
def test_a_wrong_file_is_explained_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    """Whatever is wrong with a file, the line names the place, the key, the value, the allowed."""
    assert expected in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override 'steps' must look like key=value"),
        ("=1", "override '=1' must look like"),
        ("a..b=1", "override 'a..b=1' must look like"),
        ("training.step=1", "override training.step: unknown key 'training.step'; did you mean"),
        ("training.steps=x", "override training.steps: training.steps must be an integer, got 'x'"),
        ("training.steps=", "training.steps must be an integer, got ''"),
        ("model.name=x", "override model.name: model must be text, got a mapping"),
        ("ranks=[1", "override ranks: not valid YAML"),
    ],
)
def test_a_wrong_override_is_explained(tmp_path: Path, override: str, expected: str) -> None:
    """An override is blamed by its key."""
    assert expected in complaint(tmp_path, "", override)


def test_a_refused_value_is_blamed_on_whoever_gave_it(tmp_path: Path) -> None:
    """A ValueError of `__post_init__` names the group and the source of the field it mentions."""
    reason = "training: steps must be at least 1, got 0"

    assert complaint(tmp_path, "training:\n  lr: 1\n  steps: 0") == f"run.yaml:3: {reason}"
    assert (
        complaint(tmp_path, "training: {lr: 1}", EDGE_SDK_TRAINING__STEPS="0")
        == f"environment variable EDGE_SDK_TRAINING__STEPS: {reason}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """A group whose fields are refused by their keys."""

    low: int = 1
    high: int = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusing:
    """Refuses whatever it is given, for a reason of its own."""

    why: str = ""
    page: str = ""
    name: str = ""
    ports: Ports = field(default_factory=Ports)

    def __post_init__(self) -> None:
        raise ValueError(self.why)


@pytest.mark.parametrize(
    ("why", "line"),
    [
        ("page: others can reach it; name a file", "2"),
        ("ports.high: 9 is taken by page", "5"),
        ("ports.high must be above 9", "5"),
        ("ports.low: 1 is not above the name", "5"),  # its group, in which it is left out
        ("page and name: one of the two", "2, run.yaml:3"),
        ("other: page is in its way", "2"),
    ],
)
def test_a_reason_that_begins_with_its_key_blames_that_line(
    tmp_path: Path, why: str, line: str
) -> None:
    """Also of a key further down, and whatever else the reason mentions."""
    text = f'why: "{why}"\npage: a\nname: b\nports:\n  high: 9'
    path = tmp_path / "run.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as found:
        load_config(Refusing, path, env={})

    assert str(found.value).replace(f"{tmp_path}/", "") == f"run.yaml:{line}: {why}"


def test_a_missing_required_field_is_named() -> None:
    """A required field is named by its whole path, though its group is not mentioned anywhere."""
    with pytest.raises(ConfigError, match=r"^device\.memory_gib is missing; it must be a number$"):
        load_config(Needy, env={})


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    """Missing files, folders and other encodings are configuration errors."""
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\xff")

    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        load_config(Whole, tmp_path / "none.yaml", env={})
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Whole, tmp_path, env={})
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(byte 7\)"):
        load_config(Whole, tmp_path / "latin.yaml", env={})


def test_secrets_are_shown_nowhere(tmp_path: Path) -> None:
    """A secret appears neither in an error nor in a dump that leaves secrets out."""
    assert "12345" not in complaint(tmp_path, "token: 12345")

    text = dump_config(Whole(token="hush"), without_secrets=True)

    assert "hush" not in text
    assert "token" not in text
    assert "hush" in dump_config(Whole(token="hush"))


def test_a_dump_keeps_its_meaning_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is dumped as an absolute one."""
    monkeypatch.chdir(tmp_path)

    text = dump_config(Whole(data=Path("train.jsonl")))

    (tmp_path / "run").mkdir()
    assert load(tmp_path / "run", text).data == tmp_path / "train.jsonl"


def test_an_infinite_number_survives(tmp_path: Path) -> None:
    """Infinity may be a setting and is dumped as one."""
    text = dump_config(Whole(training=Training(lr=math.inf)))

    assert load(tmp_path, text).training.lr == math.inf


TEXT = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["no", "~", "1e5", "1:30", "0x1f", "", "null", "<<", "=", ".inf", "2026-01-01", "a: b", " x "]
)
WHOLES = st.builds(
    Whole,
    model=TEXT,
    revision=st.none() | TEXT,
    debug=st.booleans(),
    token=TEXT,
    ranks=st.lists(st.integers()).map(tuple),
    port=st.integers() | st.just("auto"),
    weights=st.dictionaries(TEXT, st.floats(allow_nan=False)),
    devices=st.dictionaries(
        TEXT,
        st.builds(Device, memory_gib=st.floats(0, 1e9), tags=st.lists(TEXT).map(tuple)),
        max_size=3,
    ),
    extra=st.none() | st.builds(Training, steps=st.integers(min_value=1)),
)


@given(WHOLES)
def test_a_dump_loads_back_to_an_equal_object(
    tmp_path_factory: pytest.TempPathFactory, config: Whole
) -> None:
    """Dumping and loading is the identity, for every text and number."""
    folder = tmp_path_factory.getbasetemp()

    assert load(folder, dump_config(config)) == config


UNQUOTED = ["{abc", "}abc", "[abc", "]abc", "*abc", "&abc", "!abc", "|abc", ">abc", "%abc", "@abc"]


@pytest.mark.parametrize("word", [*UNQUOTED, "#abc", "abc:"])
def test_a_word_that_yaml_reads_otherwise_is_to_be_quoted(word: str, tmp_path: Path) -> None:
    """As some public keys: the line is named, and quoted the same word is what it says."""

    @dataclass(frozen=True, kw_only=True)
    class Keys:
        first: str
        server_key: str

    file = tmp_path / "device.yaml"
    file.write_text(f"first: a\nserver_key: {word}\n", encoding="utf-8")

    with pytest.raises(ConfigError) as refused:
        load_config(Keys, file, env={})
    file.write_text(f"first: a\nserver_key: '{word}'\n", encoding="utf-8")

    assert "device.yaml:2: " in str(refused.value)
    assert "; quote a value that " in str(refused.value)
    assert "server_key: '...'" in str(refused.value)
    assert word not in str(refused.value)
    assert load_config(Keys, file, env={}).server_key == word


@pytest.mark.parametrize("text", ["default: {split: 2, r: 1\nrounds: 2\n", "a: [1, 2\nb: 1\n"])
def test_nobody_is_told_to_quote_a_mapping_or_a_list(text: str, tmp_path: Path) -> None:
    """One that lacks its end is no word that was meant as text."""
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError) as refused:
        read_file(tmp_path / "run.yaml")

    assert "; quote a value" not in str(refused.value)

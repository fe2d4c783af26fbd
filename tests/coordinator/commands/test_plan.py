"""`coordinator plan`: the planner's numbers on a terminal and as JSON; bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import main
from tests.tiny import BLOCKS, make_config

PROFILE = {
    "memory_bytes": 1e9,
    "overhead_bytes": 1e6,
    "flops_per_s": 1e8,
    "up_bytes_per_s": 1e6,
    "down_bytes_per_s": 1e6,
    "round_trip_s": 0.01,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that holds a config and nothing else."""
    folder: Path = tmp_path_factory.mktemp("model")
    make_config("llama").save_pretrained(folder)
    return folder


def write(path: Path, content: Any) -> str:
    """Write JSON, or text as it stands."""
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def config(model: Path, tmp_path: Path) -> str:
    """A run in which everything is planned."""
    planning = {"split": "armsc", "ranks": "rngwp", "server_flops_per_s": 1e9}
    settings = {"model": str(model), "max_length": 16, "planning": planning}
    return write(tmp_path / "run.yaml", settings)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run the command; returns what it printed, or its one line of error."""
    capsys.readouterr()
    assert main(["plan", *arguments]) == code
    captured = capsys.readouterr()
    if captured.err:
        assert len(captured.err.strip().splitlines()) == 1, captured.err
    return captured.out if code == 0 else captured.err


def test_the_plan_as_json(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plans, numbers behind them and refusals, device by device, without any weights at hand."""
    profiles = [
        write(tmp_path / "small.json", PROFILE),
        write(tmp_path / "tiny.json", {**PROFILE, "memory_bytes": 25e6}),
        write(tmp_path / "dreamer.json", {**PROFILE, "flops_per_s": -1}),
        write(tmp_path / "silent.json", {}),
    ]

    found = json.loads(
        plan(capsys, "--config", config, "--profiles", *profiles, "--format", "json")
    )

    assert sorted(found["plans"]) == ["silent", "small", "tiny"]
    assert sorted(found["refused"]) == ["dreamer"]
    assert found["plans"]["silent"]["split"] == 1
    for name, story in found["explanation"]["devices"].items():
        assert [option["split"] for option in story["options"]] == list(range(1, BLOCKS + 1))
        if name == "silent":
            assert story["budget_bytes"] is story["device_s"] is None
        else:
            assert story["planned_bytes"] <= story["budget_bytes"]
            assert story["device_s"] > 0
    assert found["wave_s"] is None


def test_the_plan_as_text(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who runs what, its ranks by kind of weight and block, and with --explain every split."""
    profiles = [
        write(tmp_path / "cam.json", PROFILE),
        write(tmp_path / "gate.json", {**PROFILE, "memory_bytes": 1}),
    ]
    arguments = ["planning.split=memory", "--config", config, "--profiles", *profiles]

    short, long = plan(capsys, *arguments), plan(capsys, *arguments, "--explain")

    assert "cam" in short
    assert f"all 7 kinds of weight  1-{BLOCKS}: 16" in short
    assert "gate: refused, device 'gate': split 1 needs" in short
    assert "importance not measured yet: all weights alike" in short
    assert "chosen" not in short
    assert long.count("chosen") == 1
    assert "coordinator MiB" in long


def test_a_table_of_80_columns_cuts_no_number(
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long names and boards of many GiB fit a terminal, and blocks are counted from 1."""
    monkeypatch.setenv("COLUMNS", "80")
    profiles = [
        write(tmp_path / "kitchen-corner.json", {**PROFILE, "memory_bytes": 64e9}),
        write(tmp_path / "the-garage-at-the-back.json", {**PROFILE, "memory_bytes": 64e9}),
    ]

    arguments = ["planning.split=memory", "--config", config, "--profiles", *profiles]
    text = plan(capsys, *arguments, "--explain")

    tables = [line for line in text.splitlines() if line.startswith("  ")]
    assert max(map(len, tables)) <= 80
    assert chr(0x2026) not in text
    row = next(line.split() for line in tables if "kitchen-corner" in line)
    assert row[1] == f"1-{BLOCKS}"
    assert any(len(word) == len("54,932") and "," in word for word in row)


def test_the_least_split_is_explained(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --explain the splits below `planning.min_split` stand there as such, with no numbers."""
    profile = write(tmp_path / "cam.json", PROFILE)
    arguments = ["planning.min_split=3", "--config", config, "--profiles", profile, "--explain"]

    text = plan(capsys, *arguments)

    rows = [line.split() for line in text.splitlines()]
    assert [row for row in rows if "min_split" in row] == [["1", "min_split"], ["2", "min_split"]]
    assert "note: planning.min_split 3: no device runs fewer blocks" in text


def test_importance_from_a_file(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are worth more get more where bytes are short."""
    arguments = ["--config", config, "--format", "json"]
    profile = write(tmp_path / "cam.json", PROFILE)
    overrides = ["planning.split=fixed", "default.split=2", "planning.adapter_bytes=100000"]
    names = [
        f"model.layers.{block}.{kind}"
        for block in range(BLOCKS)
        for kind in ("self_attn.q_proj", "self_attn.o_proj")
    ]
    importance = {name: 9.0 if "q_proj" in name else 0.5 for name in names}
    file = write(tmp_path / "importance.json", importance)
    targets = "lora.target_modules=[q_proj, o_proj]"

    found = json.loads(
        plan(capsys, *overrides, targets, *arguments, "--importance", file, "--profiles", profile)
    )

    ranks = found["plans"]["cam"]["ranks"]
    assert min(r for n, r in ranks.items() if "q_proj" in n) > max(
        r for n, r in ranks.items() if "o_proj" in n
    )
    assert found["explanation"]["devices"]["cam"]["adapter_bytes"] <= 100000


def test_ranks_by_kind_and_block(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stretches of blocks with the same rank stand together, kind by kind."""
    profile = write(tmp_path / "cam.json", PROFILE)
    pattern = r"lora.rank_pattern={'layers\.[01]\..*q_proj': 3}"
    arguments = [pattern, "planning.split=memory", "--config", config, "--profiles", profile]

    text = plan(capsys, *arguments)

    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if "_proj" in line)
    assert lines["self_attn.q_proj"] == f"1-2: 3, 3-{BLOCKS}: 16"
    assert lines["self_attn.k_proj"] == f"1-{BLOCKS}: 16"


def test_nobody_can_take_part(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reasons are printed, and the exit code says that this run would not start."""
    profile = write(tmp_path / "gate.json", {**PROFILE, "memory_bytes": 1})

    assert main(["plan", "--config", config, "--profiles", profile]) == 2
    assert "gate: refused" in capsys.readouterr().out


def test_a_plan_that_does_not_fit_is_no_success(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With splits by hand it is printed, and a line and the exit code say who lacks memory."""
    profile = write(tmp_path / "gate.json", {**PROFILE, "memory_bytes": 2**20})
    fixed = ["planning.split=fixed", "planning.ranks=fixed", "default.split=2", "--config", config]

    assert main(["plan", *fixed, "--profiles", profile]) == 6

    shown = capsys.readouterr()
    assert "gate" in shown.out
    assert shown.err.startswith("coordinator: gate would need ")
    assert " MiB of 0.9\n" in shown.err
    roomy = write(tmp_path / "roomy.json", PROFILE)
    assert main(["plan", *fixed, "--profiles", roomy]) == 0


BAD: dict[str, tuple[str, str, list[str], int, tuple[str, ...]]] = {
    "no JSON": ("a.json", "{]", [], 2, ("a.json",)),
    "unknown field": ("a.json", '{"memory_byte": 1}', [], 2, ("memory_byte", "did you mean")),
    "wrong type": ("a.json", '{"memory_bytes": "much"}', [], 2, ("memory_bytes", "much")),
    "no object": ("a.json", "[]", [], 2, ("a.json",)),
    "length": ("a.json", "{}", ["max_length=65"], 2, ("max_length", "2..64")),
    "rank set": ("a.json", "{}", ["planning.rank_set=[99]"], 2, ("planning.rank_set", "99")),
    "least split": ("a.json", "{}", ["planning.min_split=9"], 2, ("planning.min_split", "1..5")),
    "fedavg": ("a.json", "{}", ["aggregation=fedavg"], 2, ("rngwp", "uniform")),
    "model": ("a.json", "{}", ["model=./absent"], 8, ("absent", "does not exist")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    """File, key and value in one line, with the exit code of its kind."""
    name, content, overrides, code, words = BAD[case]
    profile = write(tmp_path / name, content)

    line = plan(capsys, *overrides, "--config", config, "--profiles", profile, code=code)

    assert line.startswith("coordinator: ")
    assert all(word in line for word in words), line


def test_profiles_that_are_not_there_or_twice(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device has one profile, and its file exists."""
    absent = plan(capsys, "--config", config, "--profiles", "absent.json", code=2)
    first = write(tmp_path / "a.json", PROFILE)
    (tmp_path / "more").mkdir()
    second = write(tmp_path / "more" / "a.json", PROFILE)
    twice = plan(capsys, "--config", config, "--profiles", first, second, code=2)

    assert "absent.json" in absent
    assert "second profile for device 'a'" in twice


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ({"lm_head": 1.0}, "'lm_head' is no adapted weight"),
        ({"model.layers.0.self_attn.q_proj": -1}, "must be a number of at least 0, got -1"),
        ('{"model.layers.0.self_attn.q_proj": NaN}', "must be a number of at least 0, got nan"),
        ({"model.layers.0.self_attn.q_proj": "x"}, "must be a number of at least 0, got 'x'"),
    ],
)
def test_bad_importance(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, words: str
) -> None:
    """The file and what is wrong in it."""
    profile, file = (
        write(tmp_path / "a.json", PROFILE),
        write(tmp_path / "importance.json", content),
    )

    line = plan(capsys, "--config", config, "--profiles", profile, "--importance", file, code=2)

    assert words in line


BAD_DEVICES = {
    "nobody": ([], "for which devices"),
    "a board that is unknown": (["--board", "zx81"], "'zx81' is unknown; there are a100-80gb"),
    "two of one name": (["--board", "jetson-nano", "jetson-nano"], "give it a name"),
    "no value": (["--board", "cam:"], "is no [NAME:]VALUE"),
    "no name": (["--board", ":jetson-nano"], "is no [NAME:]VALUE"),
    "a name that is a path": (["--board", "../cam:jetson-nano"], "is no name"),
    "a link that is unknown": (["--board", "jetson-nano", "--link", "x25"], "there are 3g, "),
    "a link of nobody": (["--board", "jetson-nano", "--link", "cam:3g"], "no device is named"),
    "no coordinator": (["--board", "jetson-nano", "--coordinator", "x"], "neither a file nor a"),
}


@pytest.mark.parametrize("case", BAD_DEVICES)
def test_devices_that_cannot_be(case: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that stands for nothing is answered with what there is."""
    words, said = BAD_DEVICES[case]

    assert said in plan(capsys, "--config", config, *words, code=2)


def test_a_link_by_name_fills_what_a_profile_lacks(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measured link stays, one named for the device wins; without any the note says so."""
    alone = {key: value for key, value in PROFILE.items() if "bytes_per_s" not in key}
    files = [write(tmp_path / "cam.json", alone), write(tmp_path / "own.json", PROFILE)]
    words = ["--config", config, "--profiles", *files, "planning.split=fixed"]

    def seconds(*links: str) -> list[float | None]:
        said = plan(capsys, *words, "--format", "json", *links)
        found = json.loads(said)["explanation"]["devices"]
        return [found[name]["device_s"] for name in ("cam", "own")]

    none, fast = seconds(), seconds("--link", "lan-1g")
    slow = seconds("--link", "lan-1g", "own:3g")
    text = plan(capsys, *words)

    assert none[0] is None
    assert "time unknown: cam's link" in text
    assert "--link cam:LINK assumes one" in text
    assert none[1] == fast[1]
    assert fast[0] is not None
    assert fast[0] == slow[0]
    assert fast[0] < fast[1] < slow[1]  # type: ignore[operator]

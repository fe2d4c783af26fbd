"""`edge-sdk doctor` as a whole: what it looks at, what it says, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_sdk import cli
from edge_sdk.data.rows import DataConfig
from edge_sdk.doctor import compute
from edge_sdk.doctor import config as written
from edge_sdk.doctor import examine as doctor
from edge_sdk.doctor.compute import Attempt
from edge_sdk.doctor.examine import Question
from edge_sdk.doctor.finding import Finding, as_json, as_lines, failure, ok, skipped, summary
from edge_sdk.doctor.finding import warning as warned
from edge_sdk.transport.keys import create_key_pair
from profiler.sensors.sources import Sources
from tests.boards import build

MACHINE = [
    *("python", "board", "packages", "imports", "backend", "torch", "kernel", "bfloat16"),
    *("float16", "quantised", "memory", "swap", "heat", "disk (cache)", "disk (state)"),
    *("limits", "clock", "config"),
]
WRITTEN = ["keys", "data", "name", "reach", "mtu", "handshake", "session", "link"]
CPU = {"version": "2.13.0", "cuda": None, "is_available": False, "notes": [], "device": "cpu"}


def healthy(arguments: Sequence[str], _timeout_s: float) -> Attempt:
    """A process in which every kernel works."""
    found = {"error": 1e-7, "seconds": 1e-3, **CPU}
    stages = arguments[arguments.index(compute.TRIAL) + 2 :]
    lines = [json.dumps({"end": stage, "found": found}) for stage in stages]
    return Attempt(0, "\n".join(lines), "")


def killed(_arguments: Sequence[str], _timeout_s: float) -> Attempt:
    """A process that the first kernel ends."""
    return Attempt(-4, "", "")


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """A Raspberry Pi."""
    return build("raspberry_pi_5", tmp_path / "board").sources


@pytest.fixture(autouse=True)
def only_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is installed here, torch alone is tried; folders are the test's own."""
    monkeypatch.setattr(doctor.packages, "installed_backends", lambda _versions: ["torch"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def ask(tmp_path: Path, *overrides: str, env: dict[str, str] | None = None) -> Question:
    """A question about these settings."""
    given = {"EDGE_SDK_STATE": str(tmp_path)} if env is None else env
    return Question(overrides=overrides, env=given, env_prefix="EDGE_SDK_")


def test_without_a_config_the_machine_alone_is_looked_at(sources: Sources) -> None:
    """Every check of the machine once, in order; then what would show more."""
    question = Question(env={}, env_prefix="EDGE_SDK_")

    found = list(doctor.examine(question, sources, healthy))

    assert [finding.check for finding in found] == MACHINE
    assert found[-1].status == "skipped"
    assert found[-1].cure == "edge-sdk doctor --config device.yaml"


def test_a_config_adds_keys_data_and_the_way(tmp_path: Path, sources: Sources) -> None:
    """What cannot be looked at because something before it failed is skipped, not left out."""
    pair = create_key_pair(tmp_path / "device.key")
    where = "coordinator=tcp://nobody.invalid:7070"
    question = ask(tmp_path, where, f"server_key={pair.public}", "secret_key=device.key")

    found = list(doctor.examine(question, sources, healthy))

    assert [finding.check for finding in found] == MACHINE + WRITTEN
    after = {finding.check: finding for finding in found}
    assert "device's own public key" in after["keys"].text
    assert after["name"].status == "failure"
    assert {after[name].text for name in WRITTEN[3:]} == {"needs name"}


def test_an_illegal_instruction_is_one_failure(sources: Sources) -> None:
    """The check that was killed fails; those that depend on it are skipped; all others go on."""
    question = Question(env={}, env_prefix="EDGE_SDK_")

    found = list(doctor.examine(question, sources, killed))

    assert [finding.check for finding in found if finding.status == "failure"] == ["torch"]
    reasons = {finding.check: finding.text for finding in found if finding.status == "skipped"}
    assert reasons["kernel"] == reasons["quantised"] == "torch itself fails"
    assert doctor.exit_code(found) == 1


def test_the_backend_of_the_config_is_looked_at(tmp_path: Path) -> None:
    """Torch is left alone where onnxruntime computes; what that cannot do is a failure."""
    pytest.importorskip("onnxruntime")
    given = ["coordinator=tcp://h:1", "server_key=k", "backend=onnxruntime"]
    small, _ = written.read_config(None, given, {}, "EDGE_SDK_")
    wrong, _ = written.read_config(None, [*given, "device=cuda"], {}, "EDGE_SDK_")

    found = list(doctor.look_at_compute(small, Sources(tmp_path), healthy))
    impossible = doctor.check_backend(wrong)

    assert [(one.check, one.status) for one in found] == [("torch", "skipped")]
    assert doctor.check_backend(small).text.endswith("a run uses onnxruntime")
    assert impossible.status == "failure"
    assert "device: 'cuda' is not possible" in impossible.text


def test_a_training_build_that_is_missing_is_a_failure() -> None:
    """The line is that of a run: it names the package, and what that excludes."""
    given = ["coordinator=tcp://h:1", "server_key=k", "backend=onnxruntime-training"]
    config, _ = written.read_config(None, given, {}, "EDGE_SDK_")

    found = doctor.check_backend(config)

    assert found.status == "failure"
    assert "edgesplit[onnx-training]', which excludes onnxruntime" in found.text


def test_the_exit_code_is_for_scripts() -> None:
    """Warnings and what was skipped are no failure."""
    fine = [ok("a", ""), warned("b", "", ""), skipped("c", "")]

    assert doctor.exit_code(fine) == 0
    assert doctor.exit_code([*fine, failure("d", "", "")]) == 1


def test_lines_for_people() -> None:
    """Aligned; a long text is wrapped below itself on a terminal only, a command never."""
    finding = Finding("clock", "warning", "a b c d " * 10 + "end", "sudo " + "x" * 90)

    plain = as_lines(finding, 8).splitlines()
    wrapped = as_lines(finding, 8, width=60).splitlines()
    coloured = as_lines(finding, 8, colours=True)

    assert plain[0].startswith("warning  clock   a b c d")
    assert plain[1] == " " * 17 + "-> " + finding.cure
    assert len(plain) == 2
    assert len(wrapped) == 3
    assert all(len(line) <= 60 for line in wrapped[:-1])
    assert wrapped[1].startswith(" " * 17 + "c d")
    assert coloured.startswith("\033[33mwarning\033[0m  clock")


def test_lines_for_programs_and_the_last_line() -> None:
    """A list of objects with four keys; the summary counts each kind."""
    found = [ok("a", "x"), ok("b", "y"), failure("c", "z", "do"), warned("d", "", "")]

    assert json.loads(as_json(found))[2] == {
        "check": "c",
        "status": "failure",
        "text": "z",
        "cure": "do",
    }
    assert summary(found) == "4 checks: 2 ok, 1 warning, 1 failure"
    assert summary([failure("c", "z", "")] * 2) == "2 checks: 2 failures"


def test_the_doctor_itself_loads_nothing_that_could_kill_it() -> None:
    """Libraries with kernels are loaded by processes of their own only."""
    code = (
        "import edge_sdk.doctor.examine, sys; print({'torch', 'onnxruntime'} & sys.modules.keys())"
    )

    assert compute.run_python(["-c", code], 60.0).out.strip() == "set()"


# ---- config, keys, data --------------------------------------------------------------------------


def test_all_mistakes_of_a_config_are_told_at_once(tmp_path: Path) -> None:
    """Of every key by itself, with its place; and what is missing."""
    file = tmp_path / "device.yaml"
    file.write_text("coordinatr: x\nthreads: 0\ndata: {limit: 0}\npatience_s: soon\n")

    config, finding = written.read_config(file, ["server_key=k"], {}, "EDGE_SDK_")

    assert config is None
    assert finding.status == "failure"
    mistakes = finding.text.split("; ")
    assert len([text for text in mistakes if f"{file}:" in text]) == 4
    for word in ("did you mean 'coordinator'?", "threads must", "limit must", "patience_s must"):
        assert word in finding.text
    assert finding.text.endswith("coordinator is missing; it must be text")
    assert "server_key is missing" not in finding.text


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: [", "device.yaml"), (None, "device.yaml"), ("- 1", "`key: value` pairs")],
)
def test_a_file_that_is_no_config(text: str | None, word: str, tmp_path: Path) -> None:
    """Broken YAML, no file, a list: one line that says so."""
    file = tmp_path / "device.yaml"
    if text is not None:
        file.write_text(text)

    config, finding = written.read_config(file, [], {}, "EDGE_SDK_")

    assert config is None
    assert word in finding.text
    assert "\n" not in finding.text


def test_a_good_config_is_returned(tmp_path: Path) -> None:
    """File, environment and flags as in a run."""
    given = ["coordinator=tcp://h:1", "server_key=k"]

    config, finding = written.read_config(None, given, {"EDGE_SDK_THREADS": "2"}, "EDGE_SDK_")

    assert finding.status == "ok"
    assert config is not None
    assert (config.coordinator, config.threads) == ("tcp://h:1", 2)


def test_keys_and_their_modes(tmp_path: Path) -> None:
    """Missing, readable by others, no key at all, no server key: each with its command."""
    key = tmp_path / "device.key"
    create_key_pair(key)
    public = create_key_pair(tmp_path / "coordinator.key").public

    fine = written.check_keys(key, public)
    missing = written.check_keys(tmp_path / "none.key", public)
    no_server = written.check_keys(key, "coordinator.pub")
    key.chmod(0o644)
    readable = written.check_keys(key, public)
    key.chmod(0o600)
    key.write_text("hello")
    broken = written.check_keys(key, public)

    assert fine.status == "ok"
    assert "mode 0600" in fine.text
    assert missing.cure.startswith(f"edge-sdk keygen {tmp_path / 'none.key'}")
    assert readable.cure == f"chmod 600 {key}"
    assert "coordinator.key.pub" in no_server.cure
    assert {one.status for one in (missing, readable, broken, no_server)} == {"failure"}
    secret = (tmp_path / "coordinator.key").read_text().strip()
    assert not [one for one in (fine, missing, readable) if secret in one.text]


def test_data_is_read_and_never_shown(tmp_path: Path) -> None:
    """Rows are counted; a broken line is named by its number and not quoted."""
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "private words"}\n' * 5)
    bad.write_text('{"text": "private words"}\n{"txt": "private words"}\n')

    fine = written.check_data(DataConfig(path=str(good), validation_fraction=0.2))
    first = written.check_data(DataConfig(path=str(good), limit=3))
    broken = written.check_data(DataConfig(path=str(bad)))
    missing = written.check_data(DataConfig(path=str(tmp_path / "none.csv")))

    assert fine.status == "ok"
    assert fine.text.endswith("all rows are of the schema text; 4 to train, 1 to validate")
    assert "the first 3 rows" in first.text
    assert "bad.jsonl:2" in broken.text
    assert (broken.status, missing.status) == ("failure", "failure")
    assert not [one for one in (fine, broken) if "private" in one.text]
    assert written.check_data(DataConfig()).status == "skipped"
    assert written.check_data(DataConfig(path="owner/dataset")).status == "skipped"


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_prints_lines_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each check and a summary, or JSON alone; the code says if one failed."""
    monkeypatch.setattr(doctor, "examine", lambda _question: iter([ok("a", "x")]))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok       a             x\n\n1 check: 1 ok\n"

    monkeypatch.setattr(doctor, "examine", lambda _question: iter([failure("b", "y", "z")]))
    assert cli.main(["doctor", "--format", "json"]) == 1
    assert [one["check"] for one in json.loads(capsys.readouterr().out)] == ["b"]


def test_the_command_passes_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """File, overrides and the wish for a session reach the doctor."""
    asked: list[Question] = []
    monkeypatch.setattr(doctor, "examine", lambda question: iter(asked.append(question) or []))

    cli.main(["doctor", "--config", "device.yaml", "--session", "threads=2"])

    assert asked[0].config == Path("device.yaml")
    assert (asked[0].overrides, asked[0].session) == (("threads=2",), True)

"""examples/deploy: the unit, the images and the compose file say what docs/deployment.md promises.

No image is built and no service started: nothing here asks for Docker's or systemd's daemon.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator.cli import make_parser
from coordinator.fleet.config import DeployConfig, plan_of
from coordinator.rounds.launch import STOP_S
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, ConfigError, DataError, ModelError, NumericError

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy"
UNIT, CUDA = "edgesplit-coordinator.service", "edgesplit-coordinator-cuda.conf"
IMAGES = ("Dockerfile", "Dockerfile.cuda")
# systemd's own scale: 0 is shut in, 10 has no walls; below 2 it says "OK".
MOST_EXPOSURE = 2.0


def text(name: str) -> str:
    """Return the text of a file of the example."""
    return (DEPLOY / name).read_text(encoding="utf-8")


# ---- the unit ------------------------------------------------------------------------------------


def unit(name: str = UNIT) -> dict[str, str]:
    """Return the last value of each setting of a unit."""
    return dict(re.findall(r"^(\w+)=(.*)$", text(name), flags=re.MULTILINE))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit and its drop-in where systemd looks; only the program is taken from elsewhere."""
    copy, more = tmp_path / UNIT, tmp_path / f"{UNIT}.d"
    copy.write_text(text(UNIT).replace(unit()["ExecStart"].split()[0], sys.executable))
    more.mkdir()
    (more / "cuda.conf").write_text(text(CUDA))
    return copy


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("has_gpu", [False, True])
def test_systemd_understands_the_unit(installed: Path, has_gpu: bool) -> None:
    """No key is unknown and no value is wrong, with the drop-in for a GPU and without."""
    if not has_gpu:
        shutil.rmtree(f"{installed}.d")

    result = subprocess.run(
        ["systemd-analyze", "verify", str(installed)], capture_output=True, text=True, check=False
    )

    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_the_unit_shut_in(installed: Path) -> None:
    """Its own measure of what a service may do stays low."""
    shutil.rmtree(f"{installed}.d")
    ask = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(installed)]
    ask.append(f"--threshold={MOST_EXPOSURE * 10:.0f}")

    result = subprocess.run(ask, capture_output=True, text=True, check=False)

    if "offline" in result.stderr:
        pytest.skip("this systemd cannot look at a file")
    assert result.returncode == 0, result.stdout


def test_a_stop_has_the_time_it_takes() -> None:
    """SIGTERM drains within 10 s, which tests/e2e/test_service.py measures; more is allowed."""
    allowed = int(unit()["TimeoutStopSec"])
    compose = yaml.safe_load(text("compose.yaml"))["services"]["coordinator"]

    assert allowed > STOP_S + 1
    assert int(compose["stop_grace_period"].rstrip("s")) > STOP_S + 1


def test_what_a_person_must_mend_is_not_retried() -> None:
    """Wrong settings, data and models stay down, and a run that diverged; a stop is a success."""
    kinds = (ConfigError, DataError, ModelError, NumericError)

    assert {int(code) for code in unit()["RestartPreventExitStatus"].split()} == {
        kind.exit_code for kind in kinds
    }
    assert unit()["SuccessExitStatus"] == str(INTERRUPTED_EXIT_CODE)
    assert unit()["Restart"] == "on-failure"


def test_the_unit_is_of_the_kind_that_is_told() -> None:
    """Ready and watchdog are what the coordinator says, by its own process."""
    assert (unit()["Type"], unit()["NotifyAccess"]) == ("notify", "main")
    assert int(unit()["WatchdogSec"]) >= 60


def test_the_commands_exist() -> None:
    """What unit, images and compose start is understood by the command line."""
    entry = unit()["ExecStart"].split()[1:]
    commands = [entry, *(_words(name, "CMD", last=True) for name in IMAGES)]
    commands += [re.findall(r'"([^"]+)"', _health(name))[1:] for name in IMAGES]

    parsed = [make_parser().parse_args(words) for words in commands]

    assert [options.command for options in parsed] == ["serve"] * 3 + ["health"] * 2
    assert all(str(options.config) == "run.yaml" for options in parsed)
    assert all(options.resume for options in parsed[:3])


def _words(name: str, key: str, *, last: bool = False) -> list[str]:
    found = re.findall(rf"^{key} \[(.+)\]$", text(name), flags=re.MULTILINE)
    return re.findall(r'"([^"]+)"', found[-1 if last else 0])


def _health(name: str) -> str:
    found = re.search(r"^HEALTHCHECK .+\\\n +CMD (\[.+\])$", text(name), flags=re.MULTILINE)
    assert found is not None
    return found[1]


# ---- images --------------------------------------------------------------------------------------


def instructions(name: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, lines joined as Docker joins them."""
    lines = [line for line in text(name).splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    split = [line.partition(" ") for line in joined.splitlines() if line]
    return [(key, rest.strip()) for key, _, rest in split]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_says_only_what_docker_knows(name: str) -> None:
    """Every instruction exists, and what is written as a list is one of words."""
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK"}
    known |= {"ENTRYPOINT", "CMD"}
    found = instructions(name)

    assert {key for key, _ in found} == known
    assert [key for key, _ in found[:2]] == ["ARG", "FROM"]
    for key, rest in found:
        if key in ("CMD", "ENTRYPOINT"):
            assert all(isinstance(word, str) for word in yaml.safe_load(rest))
        if key == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_built_from_what_there_is(name: str) -> None:
    """What is copied exists and is let in by .dockerignore, packages and licence among it."""
    copied = {
        source for key, rest in instructions(name) if key == "COPY" for source in rest.split()[:-1]
    }
    let_in = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()

    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {f"!{source}" for source in copied} <= set(let_in)
    assert "*" in let_in
    assert {"profiler", "edge_sdk", "coordinator", "LICENSE", "constraints.txt"} <= copied


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_pinned_and_of_constraints(name: str) -> None:
    """The base has a version, and pip takes the versions of constraints.txt."""
    found = dict(instructions(name))
    [base] = re.findall(r"^ARG BASE=(\S+)$", text(name), flags=re.MULTILINE)
    pip = shlex.split(next(rest for key, rest in instructions(name) if key == "RUN"))

    assert re.search(r":\d+\.\d+\.\d+", base)
    assert pip[pip.index("--constraint") + 1] == "constraints.txt"
    assert ("--extra-index-url" in pip) == (name == "Dockerfile")
    assert found["USER"] == "10001:10001", "Kubernetes' runAsNonRoot asks for a number"


def test_extras_exist() -> None:
    """What an image installs, and may install, are extras of ours."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in IMAGES:
        [more] = re.findall(r"^# More extras, with commas: (.+)\.$", text(name), flags=re.MULTILINE)
        for extra in ["coordinator", *more.split(", ")]:
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


# ---- compose -------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    """Return the coordinator's service."""
    found: dict[str, Any] = yaml.safe_load(text("compose.yaml"))
    return found


def test_compose_builds_the_image_and_gives_it_little() -> None:
    """The Dockerfile is there; root, capabilities and a writable root are not."""
    service = compose()["services"]["coordinator"]
    build = service["build"]

    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    assert re.fullmatch(r"\$\{EDGESPLIT_UID:-\d+\}:\$\{EDGESPLIT_GID:-\d+\}", service["user"])
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["restart"].startswith("on-failure")


def test_what_is_mounted_is_where_the_image_works() -> None:
    """State, caches and temporary files lie on volumes: nothing else can be written."""
    service, found = compose()["services"]["coordinator"], dict(instructions("Dockerfile"))
    targets = {volume.rpartition(":")[2] for volume in service["volumes"]} | set(service["tmpfs"])
    environment = dict(re.findall(r"(\w+)=(\S+)", found["ENV"]))

    assert targets == {found["WORKDIR"], environment["XDG_CACHE_HOME"], "/tmp"}
    assert environment["HF_HOME"].startswith(environment["XDG_CACHE_HOME"])


# ---- boards --------------------------------------------------------------------------------------


def test_the_boards_file_loads() -> None:
    """Its keys exist, its settings are those of a device, its wheels those of the board's guide."""
    config = load_config(DeployConfig, DEPLOY / "boards.yaml", env={})
    guide = (ROOT / "examples" / "jetson" / "README.md").read_text(encoding="utf-8")

    for name in config.boards:
        board = plan_of(config, name)
        needed = ("coordinator=tcp://example:7070", "server_key=key")
        load_config(ClientConfig, overrides=[*needed, *board.settings], env={})
        for line in board.first:
            assert f"pip install {line}" in guide
    assert plan_of(config, "kitchen").extras == ("onnx",)
    assert plan_of(config, "orin").extras == ("torch",)

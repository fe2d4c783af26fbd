"""The `edge-sdk` command. Exit codes: 0 done, 130 stopped, others as in `edge_sdk/errors.py`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge_sdk.arguments import Arguments, add_examples, all_commands, complete_settings
from edge_sdk.client.callbacks import FAILED, Callback, RoundBegun, RoundSummary
from edge_sdk.client.config import ClientConfig
from edge_sdk.command import add_log_level, run_command, stopping_on_signals
from edge_sdk.config.loader import load_config
from edge_sdk.config.templates import write_config
from edge_sdk.duration import duration
from edge_sdk.errors import INTERRUPTED_EXIT_CODE, ConfigError, DataError, one_line
from edge_sdk.protocol.messages import StepReport
from edge_sdk.protocol.plan import Plan
from edge_sdk.transport.keys import create_key_pair, fingerprint

if TYPE_CHECKING:
    from edge_sdk.doctor.examine import Question
    from edge_sdk.doctor.finding import Finding

ENV_PREFIX = "EDGE_SDK_"
MOST_CODE_LETTERS = 4096
"""Of an enrolment code with whatever was copied around it."""
# Seconds of a round between two lines about its steps.
TELL_EVERY_S = 10.0
EXAMPLES = {
    "init": ["init", "init kitchen.yaml --coordinator tcp://192.168.1.10:7070"],
    "run": [
        "run --config device.yaml",
        "run --config device.yaml --supervise",
        "run --config device.yaml threads=2 data.path=train.jsonl accept.labels=device",
        "run coordinator=tcp://192.168.1.10:7070 server_key=coordinator.key.pub data.path=a.jsonl",
    ],
    "enrol": [
        "enrol 0421Q7P0-N00GMGJS-PFYJNV3D-...",
        "enrol --config kitchen.yaml - < code.txt",
    ],
    "keygen": ["keygen", "keygen keys/kitchen.key"],
    "check": [
        "check --config device.yaml",
        "check --config device.yaml --model Qwen/Qwen3-0.6B --micro-batch 2 --profile me.json",
    ],
    "doctor": [
        "doctor",
        "doctor --config device.yaml",
        "doctor --config device.yaml --session --format json",
    ],
    "data preview": [
        "data preview --config device.yaml",
        "data preview --data train.jsonl --model Qwen/Qwen3-0.6B",
        "data preview --data a.csv data.columns.prompt=mr data.columns.completion=ref",
    ],
}
"""What the help of each command ends with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `edge-sdk` command and return its exit code."""
    return run_command(make_parser(), arguments)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Arguments(
        prog="edge-sdk",
        description="Take part in a run with data that stays on this device.",
        epilog="Exit codes: docs/operations.md.",
    )
    add_log_level(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="take part in a run until it is over")
    run.add_argument("--config", type=Path, help="YAML file; keys in docs/configuration.md")
    run.add_argument(
        "--supervise",
        action="store_true",
        help="start it again when it dies of something that may pass, such as want of memory",
    )
    run.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")
    run.set_defaults(run=_run)
    _add_enrol(commands.add_parser("enrol", help="have this device registered by a code"))
    _add_init(commands.add_parser("init", help="write a commented config to begin with"))
    keygen = commands.add_parser("keygen", help="make this device's key pair")
    keygen.add_argument("path", nargs="?", default="device.key", help="default: %(default)s")
    keygen.set_defaults(run=_keygen)
    _add_check(commands.add_parser("check", help="look at everything before anybody is greeted"))
    doctor = commands.add_parser("doctor", help="look for what would break a run here")
    doctor.add_argument("--config", type=Path, help="also look at keys, data and the coordinator")
    doctor.add_argument("--format", choices=("text", "json"), default="text")
    doctor.add_argument(
        "--session",
        action="store_true",
        help="also measure the link in a session; refused while this device takes part in a run",
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")
    doctor.set_defaults(run=_doctor)
    _add_data(commands.add_parser("data", help="look at the private data before a run does"))
    add_examples(parser, EXAMPLES)
    for _, command in all_commands(parser):
        complete_settings(command, lambda: ClientConfig)
    return parser


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, default=Path("device.yaml"), help="default: %(default)s"
    )
    parser.add_argument("--coordinator", metavar="ADDRESS", help="tcp://HOST:PORT to dial")
    parser.add_argument("--server-key", metavar="KEY", help="the coordinator's, or its file")
    parser.set_defaults(run=_init)


def _init(options: argparse.Namespace) -> int:
    from edge_sdk.enrol import template_text

    given = {"coordinator": options.coordinator, "server_key": options.server_key}
    write_config(options.path, template_text(options.path, given))
    print(f"{options.path} written; change it, then: edge-sdk doctor --config {options.path}")
    return 0


def _add_enrol(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Makes this device's key, unless there is one, has it registered by the code that "
        "`coordinator enrol NAME` has printed, and writes the config. Only the public key leaves "
        "this device."
    )
    add = parser.add_argument
    add("code", nargs="+", help="the code, in one word or several; `-` reads it from stdin")
    add(
        "--config",
        type=Path,
        default=Path("device.yaml"),
        help="written, or changed in what concerns the coordinator; default: %(default)s",
    )
    add("--key", type=Path, help="secret key; default: that of the config, or device.key beside it")
    add("--coordinator", metavar="ADDRESS", help="tcp://HOST:PORT, if not that in the code")
    add(
        "--wait",
        type=_count,
        default=60,
        metavar="SECONDS",
        help="for a coordinator that does not listen yet; default: %(default)s",
    )
    parser.set_defaults(run=_enrol)


def _enrol(options: argparse.Namespace) -> int:
    from edge_sdk.enrol import enrol

    text = " ".join(options.code)
    if text == "-":  # a line of its own, or all that `coordinator enrol` has printed
        lines = sys.stdin.read(MOST_CODE_LETTERS).splitlines()
        text = next((line for line in lines if "edge-sdk enrol " in line), " ".join(lines))
    text = text.rpartition("edge-sdk enrol ")[2]
    if len(text) >= MOST_CODE_LETTERS:
        raise ConfigError("this is no enrolment code: it is too long")
    done = enrol(
        text,
        options.config,
        options.key,
        options.coordinator,
        wait_s=options.wait,
        tell=lambda line: print(line, flush=True),
    )
    made = "made" if done.is_new_key else "was there"
    print(f"enrolled as {done.name} at {done.address}")
    print(f"key:    {done.key} ({made}), fingerprint {fingerprint(done.public_key)}")
    if done.is_new_config:
        print(f"config: {done.config} (new)")
    else:
        what = f"changed: {', '.join(done.changed)}" if done.changed else "as it was"
        print(f"config: {done.config} ({what})")
    if done.is_new_config:
        print(f"next:   set data.path in {done.config}")
    print(f"then:   edge-sdk check --config {done.config}")
    print(f"        edge-sdk run --config {done.config}")
    return 0


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Looks at config, keys, all of the data and the way to the coordinator, and says how many "
        "blocks of the model would fit this device; opens no session and runs nothing."
    )
    add = parser.add_argument
    add("--config", type=Path, help="YAML file; keys in docs/configuration.md")
    add("--format", choices=("text", "json"), default="text")
    add("--model", help="folder or hub id; default: `model` of the config, else the last run's")
    add("--task", choices=("causal-lm", "sequence-classification"), default="causal-lm")
    add("--profile", type=Path, metavar="FILE", help="as `profiler measure --write` writes it")
    add("--micro-batch", type=_count, default=8, metavar="N", help="default: %(default)s")
    add("--length", type=_count, default=512, metavar="N", help="tokens; default: %(default)s")
    add("--rank", type=_count, default=8, metavar="N", help="default: %(default)s")
    add("overrides", nargs="*", metavar="key=value", help="override the config")
    parser.set_defaults(run=_check, session=False)


def _add_data(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    preview = commands.add_parser(
        "preview",
        help="samples as tokens, their lengths, and the rows that do not fit",
        description="Shows what a run would learn from: samples as tokens with what carries loss, "
        "lengths, and the rows that a run would refuse, skip, drop or cut. Nothing leaves this "
        "device. Exit code 7: a run would refuse this data.",
    )
    preview.add_argument("--config", type=Path, metavar="FILE", help="the device's YAML file")
    preview.add_argument(
        "--data",
        action="append",
        metavar="FILE",
        help="a file, pattern or folder in place of data.path; may be given several times",
    )
    preview.add_argument(
        "--model",
        help="folder with the tokenizer, or a Hugging Face id; default: `model` of the config, "
        "else what the last run has left on this device",
    )
    preview.add_argument(
        "--rows", type=_count, default=10_000, metavar="N", help="default: %(default)s"
    )
    preview.add_argument(
        "--examples", type=_count, default=3, metavar="N", help="default: %(default)s"
    )
    preview.add_argument("overrides", nargs="*", metavar="key=value", help="override the config")
    preview.set_defaults(run=_preview)


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


class _Lines(Callback):
    """Tells the terminal what happens: a line a round, and more where a round takes long."""

    def __init__(self) -> None:
        self._begun: RoundBegun | None = None
        self._began_s = self._told_s = time.monotonic()
        self._tokens = 0

    def on_status(self, doing: str) -> None:
        print(one_line(doing), flush=True)

    def on_absent(self, reason: str) -> None:
        print(one_line(reason), flush=True)

    def on_round_start(self, begun: RoundBegun) -> None:
        if self._begun is None:
            last = f"{begun.end_step} of {begun.total_steps}"
            print(f"round {begun.round + 1}: steps {begun.step + 1} to {last}", flush=True)
        self._begun, self._tokens = begun, 0
        self._began_s = self._told_s = time.monotonic()

    def on_step_end(self, report: StepReport) -> None:
        now_s, begun = time.monotonic(), self._begun
        self._tokens += report.num_tokens
        if begun is None or now_s - self._told_s < TELL_EVERY_S:
            return
        self._told_s = now_s
        done = report.stamp.step + 1
        step_s = (now_s - self._began_s) / max(1, done - begun.step)
        round_s, run_s = (
            max(0, end - done) * step_s for end in (begun.end_step, begun.total_steps)
        )
        rate = self._tokens / max(1e-9, now_s - self._began_s)
        print(
            f"round {begun.round + 1}: step {done} of {begun.total_steps}, loss {report.loss:.3f}, "
            f"{rate:.0f} tok/s; left: {duration(round_s)}, run {duration(run_s)}",
            flush=True,
        )

    def on_connect(self, run: str) -> None:
        print(f"taking part in run {one_line(run)}", flush=True)

    def on_plan(self, plan: Plan) -> None:
        where = "tail here" if plan.tail else "tail on the coordinator"
        print(f"plan: {plan.split} blocks, {len(plan.ranks)} adapters, {where}", flush=True)

    def on_round_end(self, summary: RoundSummary) -> None:
        print(
            f"round {summary.round + 1}: step {summary.step}, loss {summary.train_loss:.3f}, "
            f"{summary.bytes_up / 1e6:.1f} MB up, {summary.bytes_down / 1e6:.1f} MB down",
            flush=True,
        )

    def on_disconnect(self, reason: str) -> None:
        print(f"session lost ({one_line(reason)}); joining again", flush=True)

    def on_train_end(self, reason: str) -> None:
        if reason != FAILED:  # then the error is the one line to read
            print(f"ended: {reason}", flush=True)


def _run(options: argparse.Namespace) -> int:
    if options.supervise:
        return _supervise(options)
    from edge_sdk.client.client import EdgeClient
    from edge_sdk.client.participant import STOPPED

    config = load_config(ClientConfig, options.config, options.overrides, env_prefix=ENV_PREFIX)
    client = EdgeClient(config, callback=_Lines())
    with stopping_on_signals(client.stop):
        return INTERRUPTED_EXIT_CODE if client.run() == STOPPED else 0


def _supervise(options: argparse.Namespace) -> int:
    from edge_sdk.supervise import Supervisor

    # A wrong setting is better known here, before anything is started.
    load_config(ClientConfig, options.config, options.overrides, env_prefix=ENV_PREFIX)
    command = [sys.executable, "-m", "edge_sdk.cli", "--log-level", options.log_level]
    command += [] if options.log_file is None else ["--log-file", str(options.log_file)]
    command += ["run"]
    command += [] if options.config is None else ["--config", str(options.config)]
    command += ["--", *options.overrides]
    return Supervisor(command, lambda line: print(f"edge-sdk: {line}", file=sys.stderr)).run()


def _keygen(options: argparse.Namespace) -> int:
    pair = create_key_pair(options.path)
    print(f"secret key: {options.path} (mode 0600)")
    print(f"public key: {pair.public}  fingerprint {fingerprint(pair.public)}")
    print(f"register it: coordinator client register NAME '{pair.public}'")
    return 0


def _question(options: argparse.Namespace) -> Question:
    from edge_sdk.doctor.examine import Question

    return Question(
        config=options.config,
        overrides=tuple(options.overrides),
        env=os.environ,
        env_prefix=ENV_PREFIX,
        session=options.session,
    )


def _check(options: argparse.Namespace) -> int:
    from edge_sdk.doctor import before
    from profiler.profile import DeviceProfile

    step = before.Step(
        model=options.model,
        task=options.task,
        micro_batch=max(1, options.micro_batch),
        length=max(2, options.length),
        rank=options.rank,
        profile=load_config(DeviceProfile, options.profile, env={}),
    )
    return before.exit_code(_told(before.look(_question(options), step), options.format))


def _doctor(options: argparse.Namespace) -> int:
    from edge_sdk.doctor import examine as doctor

    return doctor.exit_code(_told(doctor.examine(_question(options)), options.format))


def _told(found: Iterable[Finding], form: str) -> list[Finding]:
    """Print each finding as soon as it is known, and return all of them."""
    from edge_sdk.doctor.examine import NAME_WIDTH
    from edge_sdk.doctor.finding import as_json, as_lines, summary

    is_terminal = sys.stdout.isatty()
    colours = is_terminal and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size().columns if is_terminal else None
    findings = []
    for finding in found:
        findings.append(finding)
        if form == "text":
            print(as_lines(finding, NAME_WIDTH, width=width, colours=colours), flush=True)
    print(f"\n{summary(findings)}" if form == "text" else as_json(findings))
    return findings


def _preview(options: argparse.Namespace) -> int:
    from edge_sdk.data.rows import validation_shard
    from edge_sdk.preview.drawing import draw
    from edge_sdk.preview.survey import find_model, survey

    overrides = list(options.overrides)
    if options.data:  # a shell may have made several files of a pattern
        files = [word for word in overrides if "=" not in word]
        overrides = [word for word in overrides if "=" in word]
        overrides.append(f"data.path={json.dumps([*options.data, *files])}")
    # Without a config nobody is asked for, so it does not matter where the coordinator is.
    nobody = [] if options.config else ["coordinator=tcp://localhost:0", "server_key=none"]
    config = load_config(ClientConfig, options.config, [*nobody, *overrides], env_prefix=ENV_PREFIX)
    reader = find_model(config, options.model)
    is_terminal = sys.stdout.isatty()
    encoding = sys.stdout.encoding or "utf-8"
    code, head = 0, f"tokenizer  {reader.origin}"
    for data in filter(None, (config.data, validation_shard(config.data))):
        found = survey(data, reader, max(1, options.rows))
        text = draw(
            found,
            reader.tokenizer,
            num_examples=options.examples if data is config.data else 0,
            width=shutil.get_terminal_size().columns if is_terminal else 80,
            colours=is_terminal and not os.environ.get("NO_COLOR"),
        )
        code = max(code, DataError.exit_code if found.stops else 0)
        try:
            print(f"{head}\n{text}".encode(encoding, "backslashreplace").decode(encoding))
            sys.stdout.flush()
        except BrokenPipeError:  # `head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        head = ""
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Write the tables of docs/models.md: what the check of `coordinator check` says of every family.

scripts/docs-models                             write
scripts/docs-models --only llama --only bert    write the rows of these families, keep the others
scripts/docs-models --check                     fail if a row is stale; with --only, one of these

Each family is examined in a process of its own, with bounds of time and memory: whatever one does,
the others have their rows. Configs are transformers' defaults; no weights are read.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from coordinator.commands.check import cuts_in_words, examine
from edge_sdk.errors import EdgeError, ModelError
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import Task, build_empty, find_layout
from edge_sdk.model.shrunk import shrink
from edge_sdk.model.weights import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN = "<!-- Models: written by scripts/docs-models. -->"
END = "<!-- End of models. -->"

# Seconds of a family, far above what any needs on an idle machine, and bytes that it may hold.
PATIENCE_S, MOST_BYTES = 240.0, 6 << 30
# Characters of a reason.
MOST_REASON = 240

# What every checkpoint's config says of how positions are turned, and the default one does not.
GLM = {"mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
ROTATIONS: dict[str, dict[str, object]] = {
    **dict.fromkeys(("paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), {"mrope_section": [16, 24, 24]}),
    **dict.fromkeys(("glm46v", "glm4v", "glmga"), GLM),
    "glm_ocr": {"mrope_section": [8, 12, 12]},
}

Fate = Literal["exact", "refused", "not built", "no verdict"]


class Case(NamedTuple):
    """A family as transformers names it in config.json, and what it is used for."""

    family: str
    task: Task


class Verdict(NamedTuple):
    """What came of a case."""

    fate: Fate
    row: str
    """Its line in the table."""


Verdicts = dict[Case, Verdict]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if stale")
    parser.add_argument("--only", action="append", default=[], metavar="FAMILY")
    parser.add_argument("--workers", type=int, default=2, help="families at a time (default 2)")
    arguments = parser.parse_args()

    cases, page = all_cases(), PAGE.read_text(encoding="utf-8")
    if unknown := set(arguments.only) - {case.family for case in cases}:
        parser.error(f"transformers has no text model {', '.join(sorted(unknown))}")
    kept: Verdicts = {}
    if arguments.only:
        if versions() not in page:
            parser.error(f"the page is of other versions than {versions()}; write all of it")
        kept = read_rows(page)
        cases = [case for case in cases if case.family in arguments.only]
    found = {**kept, **judge_all(cases, arguments.workers)}
    new = f"{page.partition(BEGIN)[0]}{tables(found)}{page.partition(END)[2]}"
    print(f"docs-models: {summary(found)}")
    if arguments.check and new != page:
        stale = sorted(set(new.splitlines()) - set(page.splitlines()))
        print("docs-models: stale; run scripts/docs-models", *stale, sep="\n", file=sys.stderr)
        return 1
    if not arguments.check:
        PAGE.write_text(new, encoding="utf-8")
    return 0


def all_cases() -> list[Case]:
    """Return every family that has a class for one of our tasks, as `auto_class` finds them."""
    speaking = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    classifying = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return sorted(
        [Case(family, "causal-lm") for family in speaking]
        + [Case(family, "sequence-classification") for family in classifying]
    )


# ---- one family ----


def judge(case: Case) -> Verdict:
    """Examine a family on its default config, as `coordinator check` would a folder with it."""
    unproven = _Unproven()
    logging.getLogger("edge_sdk").addHandler(unproven)
    try:
        config = _default_config(case)
        build_empty(config, case.task, torch.float32)
    except Exception as error:  # noqa: BLE001 - somebody else's model code may raise anything
        return _without(case, "not built", _reason(error))
    try:
        found = examine(config, case.task, LoraConfig())
    except EdgeError as error:
        return _without(case, "refused", _reason(error))
    except Exception as error:  # noqa: BLE001 - the check lets through what it should say itself
        return _without(case, "no verdict", _reason(error))
    if unproven.reason:
        return _without(case, "no verdict", unproven.reason)
    covered = found.coverage
    travels = "; token ids travel" if found.layout.needs_ids else ""
    bare = ", ".join(f"`{weight}`" for weight in covered.bare_weights)
    cells = (
        str(found.layout.num_blocks),
        f"{cuts_in_words(found.layout)}{travels}",
        f"{covered.share:.1%}".replace("100.0%", "100%" if not bare else "> 99.9%"),
        bare,
    )
    return Verdict("exact", _row(case, *cells))


def _without(case: Case, fate: Fate, reason: str) -> Verdict:
    """Return the verdict on a family that does not split, its reason as Markdown shows it."""
    plain = reason.encode("ascii", "replace").decode()
    return Verdict(fate, _row(case, re.sub(r"([\\`*\[\]<>|])", r"\\\1", plain)))


def _row(case: Case, *cells: str) -> str:
    return f"| `{case.family}` | {case.task} | {' | '.join(cells)} |".replace("|  |", "| |")


def _default_config(case: Case) -> Any:  # noqa: ANN401 - a transformers config
    """Return the family's default config, read from a file as that of a model is."""
    num_labels = 0 if case.task == "causal-lm" else 2
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(case.family)
        if case.family in ROTATIONS:
            config.get_text_config().rope_parameters.update(ROTATIONS[case.family])
        config.save_pretrained(folder)
        try:
            return load_config(Path(folder), num_labels)
        except ModelError as error:
            raise ModelError(str(error).replace(f"{folder}/", "")) from None


class _Unproven(logging.Handler):
    """Hears that a split was not proven."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("split.unchecked"):
            self.reason = record.getMessage().partition("reason=")[2]


def _reason(error: BaseException) -> str:
    """Return what an error says, in one line and without what differs from run to run."""
    text = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
    if missing := re.search(r"requires the (\S+) library", text):
        return f"it needs the package {missing[1]}, which is not installed here"
    line = " ".join(re.sub(r" at 0x[0-9a-f]+", "", text).split())
    return line if len(line) <= MOST_REASON else f"{line[: MOST_REASON - 3].rstrip()}..."


# ---- all of them ----


def judge_all(cases: Sequence[Case], workers: int) -> Verdicts:
    """Examine all cases, a process for each, *workers* at a time."""
    torch.set_num_threads(1)  # threads that wait do not outlive a fork
    _load_what_all_need()
    forked = multiprocessing.get_context("fork")
    todo, running = list(reversed(cases)), dict[Connection, _Child]()
    found: Verdicts = {}
    while todo or running:
        while todo and len(running) < workers:
            reader, writer = forked.Pipe(duplex=False)
            case = todo.pop()
            process = forked.Process(target=_child, args=(case, writer), daemon=True)
            process.start()
            writer.close()
            running[reader] = _Child(case, process, time.monotonic() + PATIENCE_S)
        ready = wait(running, timeout=1.0)
        for reader in [r for r in running if r in ready or running[r].is_late()]:
            child = running.pop(reader)
            found[child.case] = child.verdict(reader)
            told = f"{found[child.case].row}  ({len(found)} of {len(cases)})"
            print(told, file=sys.stderr, flush=True)
    return {case: found[case] for case in cases}


def _load_what_all_need() -> None:
    """Pay once for what takes seconds; no gradient, after which a process cannot be forked."""
    config = AutoConfig.for_model("llama", num_hidden_layers=2)
    layout = find_layout(config, "causal-lm")
    find_targets(config, "causal-lm", layout, LoraConfig(r=1))
    shrink(config, "causal-lm")


class _Child(NamedTuple):
    """A process that examines a case."""

    case: Case
    process: Any
    deadline_s: float

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline_s

    def verdict(self, reader: Connection) -> Verdict:
        """Return what it has found, or how it ended without; it is gone afterwards."""
        with reader:
            if not reader.poll():
                self.process.kill()
                self.process.join()
                return _without(self.case, "no verdict", f"not done within {PATIENCE_S:.0f} s")
            try:
                return Verdict(*reader.recv())
            except EOFError:
                self.process.join()
                end = f"its process ended with {self.process.exitcode}"
                return _without(self.case, "no verdict", end)
            finally:
                self.process.join()


def _child(case: Case, writer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    for stream in (1, 2):  # what libraries say of a model is not the question here
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    writer.send(tuple(judge(case)))


# ---- the page ----

GROUPS: dict[Fate, tuple[str, str, tuple[str, ...]]] = {
    "exact": (
        "Split exactly",
        "",
        ("family", "task", "blocks", "cuts", "with adapters", "without"),
    ),
    "refused": (
        "Refused",
        "What `coordinator check`, and a run before it starts, says of them.\n\n",
        ("family", "task", "reason"),
    ),
    "not built": (
        "Not built",
        "From its default config transformers builds no model of these here; a model of such a "
        "family may well have a\nconfig of which it does.\n\n",
        ("family", "task", "reason"),
    ),
    "no verdict": (
        "Without a verdict",
        "The check did not come to an end. Of a model that cannot be made narrow no stand-in is "
        "small enough: a run\nwarns of it and begins, unproven.\n\n",
        ("family", "task", "reason"),
    ),
}


def versions() -> str:
    """Return what the tables hold for."""
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


def summary(found: Verdicts) -> str:
    """Return how many there are of each kind, in a line."""
    fates = [verdict.fate for verdict in found.values()]
    words: dict[Fate, str] = {
        "exact": "split exactly",
        "refused": "refused",
        "not built": "not built",
    }
    told = [f"{fates.count(fate)} {said}" for fate, said in words.items()]
    if "no verdict" in fates:
        told.append(f"{fates.count('no verdict')} without a verdict")
    return ", ".join(told)


def tables(found: Verdicts) -> str:
    """Return what stands on the page between the markers, with them."""
    head = f"{BEGIN}\n{len(found)} rows: {summary(found)}; {versions()}.\n"
    return "\n".join([head, *_sections(found), END])


def _sections(found: Verdicts) -> Iterator[str]:
    for fate, (title, words, columns) in GROUPS.items():
        own = [found[case].row for case in sorted(found) if found[case].fate == fate]
        if own:
            yield f"## {title}\n\n{words}| {' | '.join(columns)} |"
            yield f"|{' --- |' * len(columns)}"
            yield from own
            yield ""


def read_rows(page: str) -> Verdicts:
    """Return what the page says."""
    found: Verdicts = {}
    for section in page.partition(BEGIN)[2].partition(END)[0].split("\n## ")[1:]:
        fate = next(f for f, (title, *_) in GROUPS.items() if section.startswith(f"{title}\n"))
        for row, family, task in re.findall(r"^(\| `(.+?)` \| (\S+) \|.*)$", section, re.MULTILINE):
            found[Case(family, task)] = Verdict(fate, row)
    return found


if __name__ == "__main__":
    sys.exit(main())

"""The closing page of the demo: what was learned, what it cost, and a text before and after."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from shards import Shards

from coordinator.results.history import RunHistory
from coordinator.results.lifecycle import ADAPTER
from coordinator.results.run_folder import RunFolder
from edge_sdk.command import quiet_libraries

MAX_NEW_TOKENS = 60


def print_results(
    out: Path, model: Path, shards: Shards, splits: dict[str, int], memory: dict[str, Any]
) -> None:
    """Write tables and texts to stdout."""
    # Piped, a table has no width of its own to keep to.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    run = out / "runs" / "demo"
    history = RunHistory(RunFolder(run))
    console.print()
    console.print(learned(history.metrics, splits))
    console.print(cost(history, splits, memory))
    paragraph(
        console,
        f"Above: the peak less what python, torch, transformers and PEFT take before "
        f"anything is loaded, {mib(memory['device_floor'])} MiB on a device and "
        f"{mib(memory['floor'])} MiB for plain PEFT. Plain PEFT trained the whole model in one "
        f"process for {memory['steps']} steps, on the largest batches that the devices had. "
        f"Bytes and peaks are those at the last aggregation.",
    )
    if shards.task == "causal-lm":
        show_sample(console, model, run / ADAPTER, shards)
    console.print(f"\nThe adapter is in {run / ADAPTER}", markup=False, soft_wrap=True)
    console.print(
        "Load it with peft.PeftModel.from_pretrained(base_model, that_folder).", markup=False
    )


def paragraph(console: Console, text: str, indent: int = 0) -> None:
    """Write *text* wrapped, its further lines indented."""
    for line in textwrap.wrap(text, console.width - 1, subsequent_indent=" " * indent):
        console.print(line, markup=False, soft_wrap=True)


def table(title: str, *headings: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        # A long name goes on in the next line; a number is never cut.
        side: Literal["left", "right"] = "right" if number else "left"
        made.add_column(heading, justify=side, no_wrap=number > 0, overflow="fold")
    return made


def learned(rows: list[dict[str, Any]], splits: dict[str, int]) -> Table:
    """Scores on data that nobody trained on."""
    measure = "perplexity" if "perplexity" in rows[0]["eval"] else "accuracy"
    made = table(f"What was learned: {measure}", "validation data", "before", "after")
    first, last = rows[0], rows[-1]
    made.add_row("coordinator's file", score(first["eval"]), score(last["eval"]))
    for name in splits:
        pair = (row.get("eval_by_device", {}).get(name) for row in (first, last))
        made.add_row(f"{name}, private", *(score(found) if found else "-" for found in pair))
    return made


def score(found: dict[str, float]) -> str:
    """The number that matters for the task."""
    if "perplexity" in found:
        return f"{found['perplexity']:.2f}"
    return f"{found['accuracy']:.1%}"


def cost(history: RunHistory, splits: dict[str, int], memory: dict[str, Any]) -> Table:
    """Bytes and memory of every device, and memory of the whole model beside them."""
    headings = ("", "blocks", "tokens/s", "up MB", "down MB", "peak MiB", "above MiB")
    made = table("What it cost", *headings)
    seconds = sum(row["seconds"] for row in history.costs)
    for name, split in splits.items():
        own = history.cost(name)
        made.add_row(
            name,
            str(split),
            f"{own.tokens / seconds:.0f}",
            f"{own.bytes_up / 1e6:.1f}",
            f"{own.bytes_down / 1e6:.1f}",
            mib(own.peak_bytes),
            mib(own.peak_bytes - memory["device_floor"]),
        )
    made.add_section()
    above = memory["peak"] - memory["floor"]
    made.add_row("plain PEFT", "all", "", "", "", mib(memory["peak"]), mib(above))
    return made


def mib(num_bytes: float) -> str:
    """A number of bytes in MiB."""
    return f"{num_bytes / 2**20:.0f}"


def show_sample(console: Console, model: Path, adapter: Path, shards: Shards) -> None:
    """Let the model write, greedily, before and after."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = prompt_of(shards, tokenizer)
    # The base model has not learned where to end, so it is cut off.
    texts = {"before": complete(base, tokenizer, prompt, "") + " ..."}
    tuned = PeftModel.from_pretrained(base, adapter)
    texts["after"] = complete(tuned, tokenizer, prompt, shards.end)
    console.print("\n[bold]A text, before and after[/bold] (greedy; nobody trained on this prompt)")
    for heading, text in {"prompt": prompt.strip(), **texts}.items():
        paragraph(console, f"  {heading:<8}{text}", indent=10)


def prompt_of(shards: Shards, tokenizer: Any) -> str:
    """What the model is asked to go on with."""
    row = shards.sample
    if row.schema == "completion":
        return row.prompt + "\n"
    if row.schema == "text":
        return " ".join(row.text.split()[:12])
    turns = [turn for turn in row.messages if turn["role"] != "assistant"][:2]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


def complete(model: Any, tokenizer: Any, prompt: str, end: str) -> str:
    """Return what the model writes after *prompt*, up to its end."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    stop = tokenizer.encode(end, add_special_tokens=False) if end else [tokenizer.eos_token_id]
    written = model.eval().generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=stop[-1],
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    text: str = tokenizer.decode(
        written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return text.strip()

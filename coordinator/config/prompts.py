"""The prompts of a run, read from its configuration or a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from coordinator.config.run import EvaluationConfig
from edge_sdk.data.readers import read_records
from edge_sdk.errors import ConfigError, DataError, one_line

# Most prompts of a run: each is answered at every evaluation, and devices wait meanwhile.
MOST_PROMPTS = 64
PROMPT_COLUMNS = ("prompt", "text", "instruction")


def read_prompts(evaluation: EvaluationConfig) -> list[str]:
    """Return the prompts of a run; none where none are configured.

    Raises:
        DataError: their file cannot be read, or a row of it has no prompt.
        ConfigError: there are too many.
    """
    prompts = evaluation.prompts
    if isinstance(prompts, str):
        found = _lines(prompts) if prompts.endswith(".txt") else _rows(prompts)
        if not found:
            raise DataError(f"evaluation.prompts: {prompts} holds no prompt")
    else:
        found = list(prompts)
    if len(found) > MOST_PROMPTS:
        raise ConfigError(
            f"evaluation.prompts: at most {MOST_PROMPTS} prompts, as devices wait while they are "
            "answered"
        )
    return found


def _lines(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"evaluation.prompts: {file} cannot be read: {one_line(error)}") from error
    return [line for line in text.splitlines() if line.strip()]


def _rows(file: str) -> list[str]:
    records = read_records(file, PROMPT_COLUMNS)
    return [_prompt(record, where) for where, record in islice(records, MOST_PROMPTS + 1)]


def _prompt(record: Any, where: str) -> str:
    if isinstance(record, DataError):
        raise record
    found = next((record[c] for c in PROMPT_COLUMNS if record.get(c)), None)
    if not isinstance(found, str):
        raise DataError(f"{where}: has no text under {', '.join(PROMPT_COLUMNS[:-1])}")
    return found

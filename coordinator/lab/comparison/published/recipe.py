"""From a recipe to settings: its data and its scale as `key=value`, and what is missing beforehand.

    overrides = recipe_overrides(file, ["data=e2e"], scale=None)

Runs nothing and downloads no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.lab.comparison.published.config import NeededData, PaperSection
from edge_sdk.config.sources import Entries, read_file
from edge_sdk.config.values import Spot, build
from edge_sdk.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from coordinator.lab.comparison.config import CompareConfig

DATA, WHOLE = "data", "."
SECTION = "paper"


def read_paper(file: Path | None) -> PaperSection | None:
    """Return the section `paper` of a file, None where it has none.

    Raises:
        ConfigError: the file or the section cannot be read.
    """
    tree = read_file(file) if file is not None else None
    node = tree.entries.get(SECTION) if isinstance(tree, Entries) else None
    if node is None:
        return None
    paper: PaperSection = build(PaperSection, [node], Spot(SECTION))
    return paper


def recipe_overrides(
    file: Path | None, overrides: Sequence[str], scale: str | None = None
) -> list[str]:
    """Return *overrides* with `data=FOLDER` spelled out, and below them those of the scale.

    Raises:
        ConfigError: the file has no such scale; or it needs data that nobody names, or that is
            not there. The message says what to fetch and where to put it.
    """
    paper = read_paper(file)
    if scale is not None and (paper is None or scale not in paper.scales):
        known = ", ".join(paper.scales) if paper is not None else ""
        there_are = f"there are {known}" if known else "it has none"
        raise ConfigError(f"--scale {scale}: {file} has no such scale; {there_are}")
    if paper is None:
        return list(overrides)
    given = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == DATA]
    own = [text for text in overrides if text.partition("=")[0] != DATA]
    scaled = [*paper.scales[scale], f"{SECTION}.scale={scale}"] if scale is not None else []
    if paper.data is None:
        return [*scaled, *own]
    if given:
        return [*scaled, *_paths(paper.data, given[-1]), *own]
    if not _names_all(paper.data, [*scaled, *own]):
        raise ConfigError(f"{file} needs {_wanted(paper.data)}, and add data=FOLDER")
    return [*scaled, *own]


def _names_all(data: NeededData, overrides: Sequence[str]) -> bool:
    """Return whether every file is named by a setting of its own, a scale's for instance."""
    return data.files.keys() <= {text.partition("=")[0] for text in overrides}


def _paths(data: NeededData, folder: str) -> Iterator[str]:
    """Yield the settings that name the files of *data* in *folder*, or below a hub id."""
    names = [name for name in data.files.values() if name != WHOLE]
    missing = [name for name in dict.fromkeys(names) if not (Path(folder) / name).exists()]
    if missing:
        raise ConfigError(f"data={folder}: {', '.join(missing)} not there; {_wanted(data)}")
    for key, name in data.files.items():
        yield f"{key}={folder if name == WHOLE else Path(folder) / name}"


def _wanted(data: NeededData) -> str:
    names = ", ".join(dict.fromkeys(name for name in data.files.values() if name != WHOLE))
    what = f"{data.title} ({data.license})"
    into = f"put {names} into one folder" if names else "a folder, or the Hugging Face id, will do"
    return f"{what}: fetch it from {data.origin}; {into}"


def require_model(config: CompareConfig) -> None:
    """Fail before the first run where a recipe's model can neither be found nor fetched.

    Raises:
        ConfigError: it is not there; the message says how to get it.
    """
    from edge_sdk.model.weights import locate

    try:
        locate(config.model, config.revision)
    except ModelError as error:
        raise ConfigError(
            f"{str(error).rstrip('.')}; fetch it where there is a network "
            f"(`hf download {config.model} --local-dir FOLDER`), or take a folder that you have, "
            "and add model=FOLDER"
        ) from error

"""Whether what an export needs is there: llama.cpp's converter, a token. It loads no torch.

What they are needed for is in `gguf_adapter.py` and `hub.py`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from coordinator.export.hub import check_push
from coordinator.export.options import ExportOptions
from edge_sdk.errors import ConfigError

CONVERTER = "convert_lora_to_gguf.py"
LLAMA_CPP = "LLAMA_CPP"
"""Environment variable that names llama.cpp's folder."""


def check_options(options: ExportOptions) -> None:
    """Refuse what cannot be done here, before anything is loaded.

    Raises:
        ConfigError: llama.cpp's converter, or a token for the hub, is missing.
    """
    if options.format == "gguf":
        find_converter(options.llama_cpp)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub)


def find_converter(given: Path | None) -> Path:
    """Return llama.cpp's converter of adapters, and see that what reads its work is there.

    Args:
        given: llama.cpp's folder, or the converter itself; None: `LLAMA_CPP` in the environment,
            then the search path.

    Raises:
        ConfigError: it is not there, or the package `gguf` is not.
    """
    named = given or (Path(os.environ[LLAMA_CPP]) if os.environ.get(LLAMA_CPP) else None)
    found = None if named is None else named / CONVERTER if named.is_dir() else named
    if named is None and (on_path := shutil.which(CONVERTER)) is not None:
        found = Path(on_path)
    if found is None or not found.is_file():
        where = "on the search path" if named is None else f"at {named}"
        raise ConfigError(
            f"--format gguf: no {CONVERTER} {where}; clone llama.cpp and name its folder by "
            f"--llama-cpp or in the variable {LLAMA_CPP}, or use --format merged"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--format gguf: needs the package gguf; pip install 'edgesplit[gguf]'")
    return found

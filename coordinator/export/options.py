"""How a result is asked to be written: what `coordinator export` and a program may say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edge_sdk.errors import ConfigError

Format = Literal["peft", "vllm", "gguf", "merged"]
Dtype = Literal["float32", "bfloat16", "float16"]
FORMATS: tuple[Format, ...] = get_args(Format)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is written, and whether it is pushed to a hub; names as on the command line.

    Raises:
        ConfigError: the options contradict each other.
    """

    format: Format = "peft"
    """`peft`: each weight with its own rank; `vllm`: all with one rank and one alpha; `gguf`: that,
    converted by llama.cpp; `merged`: the whole model. See docs/export.md."""
    max_rank: int | None = None
    """Most ranks of each weight that are kept; None keeps all."""
    dtype: Dtype | None = None
    """Dtype of a merged model; None: that which each weight has in the base."""
    llama_cpp: Path | None = None
    """llama.cpp's folder, or its convert_lora_to_gguf.py; None: looked for."""
    push_to_hub: str | None = None
    """Id of the repository on the hub that gets the result; None: none does."""
    public: bool = False
    """Whether everybody may read a repository that is made for it."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--format: one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.max_rank is not None and self.max_rank < 1:
            raise ConfigError(f"--max-rank: must be at least 1, got {self.max_rank}")
        if self.max_rank is not None and self.format == "merged":
            raise ConfigError("--max-rank: a merged model has no ranks; leave it out")
        if self.dtype is not None and self.format != "merged":
            raise ConfigError(
                f"--dtype: is for --format merged; adapters are float32, so leave it out for "
                f"--format {self.format}"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.llama_cpp is not None and self.format != "gguf":
            raise ConfigError("--llama-cpp: is for --format gguf; leave it out")
        if self.public and self.push_to_hub is None:
            raise ConfigError("--public: is for --push-to-hub; leave it out")

"""Which library computes on this device. Imports neither of them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from edge_sdk.client.config import ClientConfig

Backend = Literal["auto", "torch", "onnxruntime"]
NEEDS = {"torch": ("torch", "transformers", "peft"), "onnxruntime": ("onnxruntime", "tokenizers")}
INSTALL = {
    "torch": "pip install 'edgesplit[torch]'",
    "onnxruntime": "pip install 'edgesplit[onnx]'",
}


def choose_backend(config: ClientConfig) -> str:
    """Return `torch` or `onnxruntime`: what *config* asks for, by default the first there is.

    Raises:
        ConfigError: it is not installed, or cannot do what else the config asks for.
    """
    name = _installed(config.backend)
    if name == "onnxruntime":
        _check_onnxruntime(config)
    return name


def _installed(wanted: Backend) -> str:
    for name in NEEDS if wanted == "auto" else (wanted,):
        missing = [package for package in NEEDS[name] if find_spec(package) is None]
        if not missing:
            return name
    if wanted == "auto":
        raise ConfigError(
            "backend: neither torch nor onnxruntime is installed; "
            f"{INSTALL['onnxruntime']} (small) or {INSTALL['torch']}"
        )
    raise ConfigError(
        f"backend: {wanted!r} needs {', '.join(missing)}, not installed; {INSTALL[wanted]}"
    )


def _check_onnxruntime(config: ClientConfig) -> None:
    """It computes on the CPU, in float32, from the coordinator's own files as they are."""
    wrong = {
        "device": config.device not in ("auto", "cpu"),
        "compute": config.compute not in ("auto", "float32"),
        "base": config.base != "float32",
        "model": config.model is not None,
    }
    for name in [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(
            f"{name}: {getattr(config, name)!r} is not possible with the onnxruntime backend; "
            "leave it out, or set backend to 'torch'"
        )

"""What can compute on a device: the table of backends, and the choice among them.

Whoever adds one writes a `Backend` here and names it in `BACKENDS`. Importing this loads no library
that computes.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge_sdk.errors import ConfigError, ModelError
from edge_sdk.model.precision import LINEAR_BYTES, Base, BaseSetting, Compute
from profiler.profile import DeviceProfile

log = logging.getLogger(__name__)

_LOADING = threading.Lock()

if TYPE_CHECKING:
    from edge_sdk.lora.targets import LoraConfig
    from edge_sdk.protocol.messages import Welcome
    from edge_sdk.protocol.plan import Part, Plan
    from edge_sdk.runtime.interface import Runtime
    from edge_sdk.runtime.onnx_graphs import Graphs
    from edge_sdk.runtime.training import TrainingConfig


class ComputeSettings(Protocol):
    """The part of a device's config that backends read; see `ClientConfig`."""

    @property
    def backend(self) -> str:
        """Name of the backend, or `auto`."""

    @property
    def device(self) -> str:
        """Where the device computes: `auto`, `cpu`, `cuda`."""

    @property
    def compute(self) -> Compute:
        """Dtype of matrix products."""

    @property
    def base(self) -> BaseSetting:
        """How the frozen weights lie in memory; no longer `auto` when a runtime is made."""

    @property
    def model(self) -> str | None:
        """Folder or id of a local model."""

    @property
    def recompute(self) -> bool:
        """Whether the backward pass computes the blocks a second time."""

    @property
    def threads(self) -> int | None:
        """CPU threads of the backend."""


@dataclass(frozen=True, kw_only=True)
class RuntimeRequest:
    """What a backend makes a runtime of."""

    settings: ComputeSettings
    """The device's own settings."""
    files: Path
    """Folder with the model's config and tokenizer."""
    welcome: Welcome
    """The run."""
    plan: Plan
    """What the device runs."""
    parts: tuple[Part, ...]
    """Parts of the model that the plan needs; graphs among them where the backend wants them."""
    lora: LoraConfig
    """How the run's adapters are made."""
    training: TrainingConfig
    """How the run trains them."""
    total_steps: int
    """Steps of the whole run."""
    fetch: Callable[[Part], Path]
    """Returns the file of a part."""
    longest: int
    """Tokens of the longest of the device's samples."""
    tensors: Callable[[Part], Mapping[str, Any]]
    """Returns the torch tensors of a part, from the local model where one is named."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute on a device."""

    name: str
    """What a config calls it, and what a device tells the coordinator."""
    needs: tuple[str, ...]
    """Packages that must be importable."""
    wheels: tuple[str, ...]
    """Distributions of which any one brings the first of these packages."""
    install: str
    """Command that installs them."""
    check: Callable[[ComputeSettings], None]
    """Raises `ConfigError` for settings that it cannot do."""
    make: Callable[[RuntimeRequest], Runtime]
    """Builds the device's slice with the adapters of its plan."""
    tokenizer: Callable[[Path], Any]
    """Loads the tokenizer of a model folder."""
    bases: tuple[Base, ...] = ("float32",)
    """How it can keep frozen weights, as far as `base: auto` chooses among them."""
    wants_graphs: bool = False
    """Whether the coordinator must send graphs beside the parts."""
    speed_on: Callable[[ComputeSettings], tuple[str, str] | None] = lambda _: None
    """Returns torch's device and dtype to measure a block's speed with; None measures none."""
    memory_model: Callable[[ComputeSettings], DeviceProfile]
    """Returns what is known of its memory without any measurement."""

    @property
    def is_loaded(self) -> bool:
        """Whether its packages are imported."""
        return all(name in sys.modules for name in self._packages())

    def load(self) -> None:
        """Import its packages: one thread of an application at a time.

        Two that import transformers at once may find it without most of its names: the module
        replaces itself while it is imported.
        """
        with _LOADING:
            for name in self._packages():
                importlib.import_module(name)

    def _packages(self) -> tuple[str, ...]:
        """Return the outermost packages of what it needs.

        A module within one need not be importable where its runtime works: onnxruntime.training
        imports torch, which no device of that backend needs.
        """
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.needs))


def choose_backend(config: ComputeSettings) -> Backend:
    """Return what *config* asks for, by default the first that is installed.

    Raises:
        ConfigError: it is not installed, or cannot do what else the config asks for.
    """
    chosen = _installed(config.backend)
    chosen.check(config)
    return chosen


def _installed(wanted: str) -> Backend:
    automatic = (TORCH, ONNXRUNTIME)
    candidates = automatic if wanted == "auto" else (BACKENDS[wanted],)
    for backend in candidates:
        missing = missing_packages(backend)
        if not missing:
            return backend
    if wanted == "auto":
        raise ConfigError(
            f"backend: neither {' nor '.join(one.name for one in automatic)} is installed; "
            f"{ONNXRUNTIME.install} (small) or {TORCH.install}"
        )
    raise ConfigError(
        f"backend: {wanted!r} needs {', '.join(missing)}, not installed; {backend.install}"
    )


def missing_packages(backend: Backend) -> list[str]:
    """Return what *backend* needs and is not installed; imports nothing."""
    return [package for package in backend.needs if not _is_there(package)]


def _is_there(package: str) -> bool:
    """Return whether *package*, or a package inside another, is installed; imports neither."""
    whole, _, inner = package.partition(".")
    found = find_spec(whole)
    if found is None or not inner:
        return found is not None
    return PathFinder.find_spec(package, found.submodule_search_locations) is not None


# ---- torch ---------------------------------------------------------------------------------------


def _make_torch(request: RuntimeRequest) -> Runtime:
    import torch

    from edge_sdk.model.layout import building, known_layout
    from edge_sdk.model.weights import load_config
    from edge_sdk.runtime.torch_runtime import TorchRuntime

    settings, welcome = request.settings, request.welcome
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model_config = load_config(request.files, welcome.num_labels)
    task: Any = welcome.task
    assert settings.base != "auto", "decided before a runtime is made"
    tensors = {part.name: request.tensors(part) for part in request.parts}
    with building:
        return TorchRuntime(
            model_config,
            task,
            known_layout(model_config, task),
            tensors,
            request.plan,
            request.lora,
            request.training,
            request.total_steps,
            device=settings.device,
            compute=settings.compute,
            base=settings.base,
            recompute=settings.recompute,
        )


def _torch_tokenizer(folder: Path) -> Any:
    from edge_sdk.model.weights import load_tokenizer

    return load_tokenizer(folder)


def _torch_place(settings: ComputeSettings) -> tuple[str, str]:
    """Return device and dtype of products, once the threads are set that are asked for."""
    import torch

    from edge_sdk.model.precision import compute_name
    from edge_sdk.runtime.torch_runtime import pick_device

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    return device.type, compute_name(settings.compute, device)


def _torch_memory(settings: ComputeSettings) -> DeviceProfile:
    return DeviceProfile(
        linear_bytes=None if settings.base == "auto" else LINEAR_BYTES.get(settings.base),
        base_bytes=2.0 if settings.base in ("bfloat16", "float16") else None,
        compute_bytes=None if _torch_place(settings)[1] == "float32" else 2.0,
        recompute="slice" if settings.recompute else None,
    )


# ---- onnxruntime ---------------------------------------------------------------------------------


def _check_onnxruntime(settings: ComputeSettings) -> None:
    """Refuse all but the CPU, float32, and the coordinator's own files as they are."""
    wrong = {
        "device": settings.device not in ("auto", "cpu"),
        "compute": settings.compute not in ("auto", "float32"),
        "base": settings.base not in ("float32", "auto"),
        "model": settings.model is not None,
    }
    for name in [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(
            f"{name}: {getattr(settings, name)!r} is not possible with the onnxruntime backend; "
            "leave it out, or set backend to 'torch'"
        )


def _make_onnxruntime(request: RuntimeRequest) -> Runtime:
    return _onnx_runtime(request, lambda graphs: graphs)


def _make_onnxruntime_training(request: RuntimeRequest) -> Runtime:
    from edge_sdk.runtime.onnx_gradients import with_own_gradients

    return _onnx_runtime(request, with_own_gradients)


def _onnx_runtime(request: RuntimeRequest, prepare: Callable[[Graphs], Graphs]) -> Runtime:
    from edge_sdk.model.safetensors_files import map_part
    from edge_sdk.runtime.onnx_graphs import PART_NAME, read_graphs
    from edge_sdk.runtime.onnx_runtime import OnnxRuntime
    from edge_sdk.runtime.onnx_sizes import Sizes, check_room
    from profiler.estimate.sizes import TAIL_TARGETS
    from profiler.sensors.memory import memory_info

    paths = {part.name: request.fetch(part) for part in request.parts}
    if PART_NAME not in paths:
        raise ModelError("the coordinator sent no graphs; it may be older than this device")
    graphs = read_graphs(paths.pop(PART_NAME))
    log.info("graphs.taken sha256=%s", next(p.sha256 for p in request.parts if p.name == PART_NAME))
    rank = max(request.plan.ranks.values(), default=0)
    sizes = Sizes(B=request.plan.micro_batch, T=request.longest, N=TAIL_TARGETS, R=rank)
    check_room(graphs.programs(), sizes, memory_info().total.value or math.inf)
    graphs = prepare(graphs)
    return OnnxRuntime(
        graphs,
        {name: map_part(path) for name, path in paths.items()},
        request.plan,
        request.lora,
        request.training,
        request.total_steps,
        threads=request.settings.threads,
    )


def _plain_tokenizer(folder: Path) -> Any:
    from edge_sdk.data.fast_tokenizer import PlainTokenizer

    return PlainTokenizer(folder)


# ---- the table -----------------------------------------------------------------------------------

TORCH = Backend(
    name="torch",
    needs=("torch", "transformers", "peft"),
    wheels=("torch",),
    install="pip install 'edgesplit[torch]'",
    check=lambda _: None,
    make=_make_torch,
    tokenizer=_torch_tokenizer,
    bases=("float32", "int8"),
    speed_on=_torch_place,
    memory_model=_torch_memory,
)
ONNXRUNTIME = Backend(
    name="onnxruntime",
    needs=("onnxruntime", "tokenizers"),
    # All of them install the folder `onnxruntime`; the last one overwrites parts of the others.
    wheels=("onnxruntime", "onnxruntime-gpu", "onnxruntime-training", "onnxruntime-training-cpu"),
    install="pip install 'edgesplit[onnx]'",
    check=_check_onnxruntime,
    make=_make_onnxruntime,
    tokenizer=_plain_tokenizer,
    wants_graphs=True,
    memory_model=lambda _: DeviceProfile(recompute="block"),
)
ONNXRUNTIME_TRAINING = replace(
    ONNXRUNTIME,
    name="onnxruntime-training",
    # Only the training build has this folder; onnx adds the gradient of the output as an input.
    needs=("onnxruntime.training", "onnx", "tokenizers"),
    wheels=("onnxruntime-training", "onnxruntime-training-cpu"),
    install="pip install 'edgesplit[onnx-training]', which excludes onnxruntime: uninstall that "
    "first",
    make=_make_onnxruntime_training,
    memory_model=lambda _: DeviceProfile(recompute="own-block"),
)
BACKENDS = {backend.name: backend for backend in (TORCH, ONNXRUNTIME, ONNXRUNTIME_TRAINING)}
"""Every backend by its name; `auto` takes torch, else onnxruntime."""

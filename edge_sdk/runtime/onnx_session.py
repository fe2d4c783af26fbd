"""A slice as onnxruntime sees it: sessions, weights mapped from disk, factors handed in.

Knows blocks and tails as graphs (`onnx_graphs.py`); knows no
optimizer, no adapter rule and no network.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort

from edge_sdk.errors import DeviceError, ModelError, one_line
from edge_sdk.lora.targets import Shape
from edge_sdk.model.safetensors_files import Stored
from edge_sdk.runtime.onnx_graphs import FOLDED, Graphs

# TensorProto.BFLOAT16: numpy has no dtype for it.
BFLOAT16 = 16
# A model of one Cast from float32 to bfloat16, from `x` to `y`.
TO_BFLOAT16 = bytes.fromhex(
    "08083a320a170a01781201792204436173742a090a02746f1810a001021201675a090a017812040a"
    "02080162090a017912040a02081042040a001012"
)
# Warnings about what the optimizer of graphs could not do help nobody on a device.
LOG_ERRORS = 3
# No folder can have this name: what is above it is a device, on every system that we run on.
NOWHERE = "/dev/null/nowhere"
Factor = Callable[[str], Mapping[str, np.ndarray]]


class OnnxModel:
    """Runs the graphs of a slice over weights that stay where they are.

    Args:
        graphs: What `coordinator/onnx_export/export.py` has made for the slice.
        weights: Tensors of all its parts, by whole-model name.
        threads: CPU threads; None leaves onnxruntime's own choice.
        folds: Whether targets' weights have their residuals inside; they are float32 then.
    """

    def __init__(
        self,
        graphs: Graphs,
        weights: Mapping[str, Stored],
        threads: int | None = None,
        *,
        folds: bool = False,
    ) -> None:
        self.about = graphs.about
        self._form = FOLDED if folds else ""
        self._graphs = graphs
        self._options = _options(threads)
        self._weights = {name: _mapped(stored) for name, stored in weights.items()}
        self._sessions: dict[str, Any] = {}

    def replace(self, name: str, array: np.ndarray) -> None:
        """Let *array*, which may change in place, stand for a weight."""
        self._weights[name] = ort.OrtValue.ortvalue_from_numpy(array)

    # ---- what there is ----

    def prefix(self, index: int) -> str:
        """Return what the names of a block's weights begin with."""
        return f"{self.about.blocks_path}.{index}."

    def targets(self) -> dict[str, Shape]:
        """Return the weights that may have an adapter, by module name, in the graphs' order."""
        targets: dict[str, Shape] = {}
        for index, kind in enumerate(self.about.kinds):
            sizes = {i.name: i.shape for i in self._session(f"{self._form}vjp.{kind}").get_inputs()}
            for name in [n.removesuffix(".A") for n in sizes if n.endswith(".A")]:
                shape = Shape(sizes[f"{name}.B"][0], sizes[f"{name}.A"][1])
                targets[self.prefix(index) + name] = shape
        return targets

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            try:
                self._sessions[name] = ort.InferenceSession(
                    self._graphs.models[name], self._options, providers=["CPUExecutionProvider"]
                )
            except KeyError:
                raise ModelError(f"the coordinator sent no graph {name!r}") from None
            except Exception as error:  # noqa: BLE001 - onnxruntime has many, without a base
                raise ModelError(f"graph {name!r} cannot be loaded: {one_line(error)}") from error
        return self._sessions[name]

    # ---- running ----

    def enter(self, input_ids: np.ndarray, lengths: np.ndarray) -> Any:
        """Embed (B, T) token ids; return what enters block 0, (B, T, D)."""
        given = {"input_ids": input_ids, "lengths": lengths}
        return self._run("front", ["out"], given, "")["out"]

    def block(self, index: int, hidden: Any, lengths: np.ndarray, factors: Factor) -> Any:
        """Run a block; return its output (B, T, D)."""
        given = {"hidden": hidden, "lengths": lengths, **self._factors(index, factors)}
        name = f"{self._form}block.{self.about.kinds[index]}"
        return self._run(name, ["out"], given, self.prefix(index))["out"]

    def pull(
        self,
        index: int,
        given: Mapping[str, Any],
        factors: Factor,
        wanted: Sequence[str],
        *,
        measures: bool = False,
    ) -> dict[str, Any]:
        """Run a block's forward and backward pass.

        Args:
            index: Which block.
            given: `hidden` and `grad` (B, T, D), `lengths` (B,).
            factors: A, s B, V and U of a weight by module name.
            wanted: Outputs: `grad:hidden`, `grad:<weight inside the block>.<A or B>`, and when it
                measures, `<form>:<weight inside the block>`. Nothing else is computed.
            measures: Use the graph that also knows importance.
        """
        what = "measure" if measures else "vjp"
        name = f"{self._form}{what}.{self.about.kinds[index]}"
        return self._run(
            name, wanted, {**given, **self._factors(index, factors)}, self.prefix(index)
        )

    def tail(
        self, hidden: np.ndarray, lengths: np.ndarray, labels: np.ndarray, wanted: Sequence[str]
    ) -> dict[str, Any]:
        """Run norm, head and loss; outputs: `loss`, `hits`, `grad:hidden`, `grad:<head>`."""
        given = {"hidden": hidden, "lengths": lengths, "labels": labels}
        return self._run("tail", wanted, given, "")

    def _factors(self, index: int, factors: Factor) -> dict[str, Any]:
        prefix, kind = self.prefix(index), self.about.kinds[index]
        names = [i.name for i in self._session(f"{self._form}block.{kind}").get_inputs()]
        return {
            f"{name.removesuffix('.A')}.{factor}": array
            for name in names
            if name.endswith(".A")
            for factor, array in factors(prefix + name.removesuffix(".A")).items()
        }

    def _run(
        self, name: str, wanted: Sequence[str], given: Mapping[str, Any], prefix: str
    ) -> dict[str, Any]:
        session = self._session(name)
        feeds = {}
        for entry in session.get_inputs():
            known = given.get(entry.name)
            is_weight = known is None
            feeds[entry.name] = self._weight(prefix, entry.name) if is_weight else _value(known)
        try:
            outputs = session.run_with_ort_values(list(wanted), feeds, _only_wanted())
        except Exception as error:  # noqa: BLE001 - onnxruntime has many, without a base
            raise _run_error(error) from error
        return dict(zip(wanted, outputs, strict=True))

    def _weight(self, prefix: str, name: str) -> Any:
        weight = self._weights.get(prefix + name) or self._weights.get(name)
        if weight is None:
            raise ModelError(f"the parts hold no tensor {prefix + name!r}")
        return weight


def version() -> str:
    """Return the version of onnxruntime."""
    return str(ort.__version__)


def confined_options() -> Any:
    """Return options with which a model made of bytes reads no file, whatever it says.

    onnxruntime takes data that a model says to lie in other files from the working directory, which
    may hold keys and rows. Releases that know this option look nowhere else than in a folder that
    is not there; what older ones are given holds no such thing (`onnx_rules.py`).
    """
    options = ort.SessionOptions()
    options.log_severity_level = LOG_ERRORS
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", NOWHERE
    )
    # Bytes could pass for onnxruntime's own format, which nobody has looked at.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    return options


def _options(threads: int | None) -> Any:
    options = confined_options()
    # Patterns are kept for every shape that was ever seen; ours vary with each micro-batch.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@cache
def _only_wanted() -> Any:
    options = ort.RunOptions()
    options.only_execute_path_to_fetches = True
    options.log_severity_level = LOG_ERRORS
    return options


def _mapped(stored: Stored) -> Any:
    """Return a weight where it lies; a copy where this onnxruntime maps no bfloat16, as 1.19."""
    if stored.dtype != "BF16":
        return ort.OrtValue.ortvalue_from_numpy(stored.array)
    make = getattr(ort.OrtValue, "ortvalue_from_numpy_with_onnx_type", None)
    if make is not None:
        return make(stored.array, BFLOAT16)
    wide = ort.OrtValue.ortvalue_from_numpy(stored.float32())
    return _to_bfloat16().run_with_ort_values(["y"], {"x": wide})[0]


@cache
def _to_bfloat16() -> Any:
    options = _options(1)
    options.enable_cpu_mem_arena = False  # it would keep the largest of what it was given
    return ort.InferenceSession(TO_BFLOAT16, options, providers=["CPUExecutionProvider"])


def _value(array: Any) -> Any:
    """Return an array as onnxruntime takes it, without a copy where it is in order."""
    if isinstance(array, ort.OrtValue):
        return array
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _run_error(error: Exception) -> Exception:
    text = one_line(error)
    if "allocate memory" in text or "bad_alloc" in text:
        return MemoryError(text)
    return DeviceError(f"onnxruntime: {text}")

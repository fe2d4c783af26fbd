"""Trace what a device without torch computes: its blocks, their gradients, and the tail.

The model's own code runs once on tensors without data; what comes out is a graph of aten operators
in which batch, length and ranks are symbols. Weights and adapters are inputs. Knows no ONNX, no
files, no network and no weight's value.

Legend: B sequences, T positions, D hidden size, M tokens, N targets, V vocabulary or classes, R, S
ranks, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu, log_softmax
from transformers.activations import NewGELUActivation

from coordinator.onnx_export.trace import SIZES, Input, Traced, trace
from edge_sdk.lora.targets import Shape
from edge_sdk.model.layout import is_transposed
from edge_sdk.model.partition import Slice, head_names

FACTORS = "ABVU"
FORMS = ("free", "signed", "reference")
LENGTHS = Input(("B",), torch.int64)


class Seen(NamedTuple):
    """What a target has computed with for M tokens, and *plain*, its output without adapters."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    is_transposed: bool
    x: torch.Tensor
    plain: torch.Tensor
    inside: tuple[torch.Tensor, torch.Tensor] | None
    """V and U of a residual that is inside the weight and does not count as such."""


class Tracer:
    """Traces a slice piece by piece: embeddings, each block, the gradient of each, the tail.

    Args:
        slice_: A slice of which every block that is traced is present; values do not matter.
        targets: The weights that adapters may change, by module name.
        dtypes: What each weight is stored as, by name; computations are in float32.
    """

    def __init__(
        self, slice_: Slice, targets: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self._slice, self._targets, self._dtypes = slice_, targets, dtypes
        self._slice.model.eval()
        config: Any = slice_.model.config
        self._config = config.get_text_config()
        # Half of the model's table of positions: some models spend rows of it on padding.
        self._largest = max(SIZES["T"], getattr(self._config, "max_position_embeddings", 0) // 2)
        for module in slice_.model.modules():
            if isinstance(module, NewGELUActivation):
                # The same function as one operator: its gradient keeps one tensor, not six.
                module.forward = partial(gelu, approximate="tanh")  # type: ignore[method-assign]

    # ---- the pieces ----

    def front(self) -> Traced:
        """Trace token ids and lengths to what enters block 0."""

        def run(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            with self._in_place(values):
                return (self._slice.front(values["input_ids"], values["lengths"], 0),)

        ids = Input(("B", "T"), torch.int64)
        weights = self._weights(self._slice.layout.front)
        return trace(
            run, {"input_ids": ids, "lengths": LENGTHS, **weights}, ("out",), self._largest
        )

    def block(self, index: int, *, folded: bool = False) -> Traced:
        """Trace what enters a block to what leaves it; names are those inside the block.

        *folded*: the residuals are inside the targets' weights, which are float32 therefore.
        """
        own = self._block_inputs(index, folded=folded)
        inputs = {"hidden": self._hidden(), "lengths": LENGTHS, **own}
        return trace(
            lambda values: (self._block(index, values, {}, folded=folded),),
            inputs,
            ("out",),
            self._largest,
        )

    def block_vjp(self, index: int, *, measures: bool = False, folded: bool = False) -> Traced:
        """Trace the same and dL/dout to dL/dhidden, and to dL/dA and dL/d(s B) of every target.

        The forward pass is part of it: nothing is kept between a block's two graphs. With
        *measures*, every form of `edge_sdk.lora.importance` of every target comes out as well.
        """
        inputs = {"hidden": self._hidden(), "lengths": LENGTHS, "grad": self._hidden()}
        own = self._block_inputs(index, folded=folded, measures=measures)
        inputs |= own
        trained = ["hidden", *(n for n in own if n.endswith((".A", ".B")))]
        targets = [n.removesuffix(".A") for n in trained if n.endswith(".A")] * measures

        def run(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            leaves = {n: values[n].detach().requires_grad_(True) for n in trained}
            seen: dict[str, Seen] = {}
            out_BTD = self._block(index, {**values, **leaves}, seen, folded=folded)
            wanted = [*leaves.values(), *(seen[n].plain for n in targets)]
            grads = torch.autograd.grad(out_BTD, wanted, values["grad"])
            pairs = zip(targets, grads[len(trained) :], strict=True)
            measured = (number for n, grad in pairs for number in _importance(seen[n], grad))
            return *grads[: len(trained)], *measured

        outputs = [f"grad:{name}" for name in trained]
        outputs += [f"{form}:{name}" for name in targets for form in FORMS]
        return trace(run, inputs, tuple(outputs), self._largest)

    def tail(self) -> Traced:
        """Trace hidden state and labels to loss sum, hits, dL/dh and a trainable head's gradients.

        A causal LM is asked at its targets only: norm and head look at one position at a time, so
        that N positions with a target pass as one sequence.
        """
        head = head_names(self._slice)
        is_causal = self._slice.task == "causal-lm"

        def run(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            leaves = {n: values[n].detach().requires_grad_(True) for n in ("hidden", *head)}
            with self._in_place({**values, **leaves}):
                last = self._slice.layout.num_blocks
                logits = self._slice.logits(leaves["hidden"], values["lengths"], last)
            logits_NV = logits[0] if is_causal else logits
            labels_N = values["labels"]
            scores_NV = log_softmax(logits_NV.float(), -1)
            loss = -scores_NV.gather(1, labels_N[:, None]).sum()
            hits = (logits_NV.argmax(-1) == labels_N).long().sum()
            return loss, hits, *torch.autograd.grad(loss, list(leaves.values()))

        inputs = {
            "hidden": self._hidden(1, "N") if is_causal else self._hidden(),
            "lengths": Input((1,), torch.int64) if is_causal else LENGTHS,
            "labels": Input(("N",) if is_causal else ("B",), torch.int64),
            **self._weights(self._tail_names()),
        }
        outputs = ("loss", "hits", "grad:hidden", *(f"grad:{name}" for name in head))
        return trace(run, inputs, outputs, self._largest)

    # ---- inputs ----

    def _hidden(self, rows: int | str = "B", positions: str = "T") -> Input:
        return Input((rows, positions, self._slice.layout.width))

    def _tail_names(self) -> list[str]:
        layout = self._slice.layout
        return [*(layout.front if layout.tail_needs_front else ()), *layout.tail]

    def _weights(self, names: Iterable[str]) -> dict[str, Input]:
        tensors = self._tensors()
        return {
            n: Input(tuple(tensors[n].shape), self._dtypes.get(n, tensors[n].dtype)) for n in names
        }

    def _prefix(self, index: int) -> str:
        return f"{self._slice.layout.blocks_path}.{index}."

    def _block_inputs(
        self, index: int, *, folded: bool, measures: bool = False
    ) -> dict[str, Input]:
        """Return weights and factors, by their names inside the block.

        Who measures takes out what is inside a weight, and needs to know it.
        """
        inputs = self._weights(self._slice.layout.blocks[index])
        pairs = (("A", "B"), ("V", "U"))[: 1 if folded and not measures else 2]
        for name, shape in self._targets.items():
            is_here = name.startswith(self._prefix(index))
            if is_here and folded:
                inputs[f"{name}.weight"] = Input(inputs[f"{name}.weight"].shape)
            for down, up in pairs if is_here else ():
                inputs[f"{name}.{down}"] = Input(("R", shape.num_inputs))
                inputs[f"{name}.{up}"] = Input((shape.num_outputs, "R"))
        return {name.removeprefix(self._prefix(index)): entry for name, entry in inputs.items()}

    # ---- running the model's code ----

    def _block(
        self,
        index: int,
        values: dict[str, torch.Tensor],
        seen: dict[str, Seen],
        *,
        folded: bool,
    ) -> torch.Tensor:
        prefix = self._prefix(index)
        named = {prefix + n: v for n, v in values.items()} | values
        with self._in_place(named), self._adapted(index, values, seen, folded=folded):
            return self._slice.middle(values["hidden"], values["lengths"], index, index + 1)

    @contextmanager
    def _adapted(
        self,
        index: int,
        values: Mapping[str, torch.Tensor],
        seen: dict[str, Seen],
        *,
        folded: bool,
    ) -> Iterator[None]:
        """Let the targets of a block return W x + s B A x + U V x; the scale is inside B.

        *folded*: W has U V in it.
        """
        prefix, model = self._prefix(index), self._slice.model
        handles = []
        for name in self._targets:
            if name.startswith(prefix):
                inside = name.removeprefix(prefix)
                factors = {f: values.get(f"{inside}.{f}") for f in FACTORS}
                hook = partial(_add_adapters, factors, seen, inside, folded)
                handles.append(model.get_submodule(name).register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tensors(self) -> dict[str, torch.Tensor]:
        model = self._slice.model
        named = model.named_parameters(), model.named_buffers()
        return {name: tensor for tensors in named for name, tensor in tensors}

    @contextmanager
    def _in_place(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let the model use *values*, in float32, wherever it has the tensors of these names."""
        tensors = self._tensors()
        new = {id(tensors[n]): _computed(v) for n, v in values.items() if n in tensors}
        held = [
            (owned, name, tensor)
            for module in self._slice.model.modules()
            for owned in (module._parameters, module._buffers)
            for name, tensor in owned.items()
            if id(tensor) in new
        ]
        try:
            for owned, name, tensor in held:
                owned[name] = new[id(tensor)]  # type: ignore[assignment]
            yield
        finally:
            for owned, name, tensor in held:
                owned[name] = tensor  # type: ignore[assignment]


def _add_adapters(
    factors: Mapping[str, Any],
    seen: dict[str, Seen],
    name: str,
    folded: bool,
    module: nn.Module,
    args: tuple[Any, ...],
    out: torch.Tensor,
) -> torch.Tensor:
    a_RI, b_OR, v_SI, u_OS = (factors[letter] for letter in FACTORS)
    x_MI = args[0].reshape(-1, args[0].shape[-1])
    y_MO = out.reshape(-1, out.shape[-1])
    layer: Any = module
    inside = (v_SI, u_OS) if folded and v_SI is not None else None
    seen[name] = Seen(layer.weight, layer.bias, is_transposed(module), x_MI, y_MO, inside)
    if not folded:
        y_MO = torch.addmm(y_MO, x_MI @ v_SI.t(), u_OS.t())
    y_MO = torch.addmm(y_MO, x_MI @ a_RI.t(), b_OR.t())
    return y_MO.reshape(out.shape)


def _importance(seen: Seen, grad_MO: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what each of `FORMS` finds in one micro-batch; see `edge_sdk.lora.importance`."""
    plain_MO = seen.plain if seen.bias is None else seen.plain - seen.bias
    weight = seen.weight
    if seen.inside is not None:
        v_SI, u_OS = seen.inside
        plain_MO = plain_MO - (seen.x @ v_SI.t()) @ u_OS.t()
        weight = weight - (v_SI.t() @ u_OS.t() if seen.is_transposed else u_OS @ v_SI)
    dots_M = (grad_MO * plain_MO).sum(-1)
    product = seen.x.t() @ grad_MO if seen.is_transposed else grad_MO.t() @ seen.x
    return dots_M.abs().sum(), dots_M.sum(), (product * weight).abs().sum()


def _computed(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value

"""Adapters of experts that a model stacks in one parameter: PEFT's `target_parameters`.

Names, shapes, scales and the matrix that is added are PEFT's; the factors of an expert stand beside
its frozen matrix instead of being multiplied out, as PEFT does for all experts at every pass.

Legend: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edge_sdk.lora.factors import Array
from edge_sdk.lora.targets import Shape
from edge_sdk.model.experts import Term, expert_sizes, expert_weights, find_stack, take_place


class ExpertAdapters:
    """Factors on the experts of a model, by the name of the parameter and of the adapter."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.shapes: dict[str, Shape] = {}
        """Every parameter that may have an adapter."""
        for name in expert_weights(model):
            path, _, leaf = name.rpartition(".")
            self.shapes[name] = Shape(*expert_sizes(model.get_submodule(path), leaf))

    def add(
        self, name: str, adapter: str, factors: tuple[Array, Array], scale: float, *, trained: bool
    ) -> None:
        """Give parameter *name* an adapter, or its adapter of that name new A and B."""
        stack = take_place(self._model, name)
        tensors = (torch.from_numpy(np.array(x, np.float32)).to(stack.device) for x in factors)
        a_ERI, b_EOR = (nn.Parameter(tensor, requires_grad=trained) for tensor in tensors)
        stack.terms[adapter] = Term(a_ERI, b_EOR, scale)

    def factors(self, name: str, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A and B of an adapter, as they are computed with."""
        term = take_place(self._model, name).terms[adapter]
        return term.a_ERI, term.b_EOR

    def most_numbers(self) -> int:
        """Return how many numbers factors of full rank on all present experts have."""
        return sum(
            shape.num_experts * (shape.num_outputs + shape.num_inputs) * shape.most_rank
            for name, shape in self.shapes.items()
            if self._is_here(name)
        )

    def _is_here(self, name: str) -> bool:
        stack = find_stack(self._model, name)
        if stack is not None and stack.packed:
            return not stack.packed[0].codes.is_meta
        path, _, leaf = name.rpartition(".")
        weight = self._model.get_submodule(path)._parameters[leaf]
        return weight is not None and not weight.is_meta

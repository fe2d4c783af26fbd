"""Run a model without weights and see what reaches what: which tensors, which blocks, which ids.

The model's own code runs once or twice on a few tokens. Whatever owns weights is computed on the
meta device, with a gradient graph but without numbers; what lies in between (masks, positions) runs
for real, because it looks at values. What a block needs beside its hidden state is then whatever
the graph behind its output leads to, once the hidden state is cut off that graph. Knows no model
family.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from edge_sdk.errors import ModelError, one_line

# Sizes that are hardly a model's own, so that the axes of a hidden state can be told apart.
ROWS, POSITIONS = 3, 5


class Observed(NamedTuple):
    """What a run without weights has shown; tensors by their whole-model names."""

    front: tuple[str, ...]
    """Tensors that are used before the last block, outside of the blocks."""
    tail: tuple[str, ...]
    """Tensors that are used after it."""
    needs: tuple[frozenset[str], ...]
    """For each block, what reaches the next one's input by another way than its own hidden state
    and its own weights."""
    tail_needs: frozenset[str]
    """The same for the logits."""
    returned: int
    """Values that a block returns; 0 where it returns a hidden state and no tuple."""
    hidden_shape: tuple[int, ...]
    """Shape of the hidden state for `ROWS` sequences of `POSITIONS` tokens."""
    ids_matter: bool
    """Whether blocks after the first see which tokens there are, by another way than the hidden
    state."""


def watch(model: nn.Module, blocks_path: str) -> Observed:
    """Run *model*, whose parameters lie on the meta device, and return what was seen.

    Raises:
        ModelError: its code cannot run without values, or never calls its blocks.
    """
    return _Run(model, blocks_path).seen()


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers that sit directly on *module*."""
    buffers = {
        n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set
    }
    return {n: t for n, t in {**module._parameters, **buffers}.items() if t is not None}


def first_names(model: nn.Module) -> dict[int, str]:
    """Return the name of every tensor by its identity: of several the one that others are tied to.

    That is mostly the first; but some models make their heads before their embeddings.
    """
    state = model.state_dict(keep_vars=True)
    sources = set(getattr(model, "all_tied_weights_keys", {}).values())
    by_rank = sorted(state, key=lambda name: name not in sources)
    return {id(state[name]): name for name in reversed(by_rank)}


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the hidden state among a block's arguments."""
    return args[0] if args else kwargs["hidden_states"]


class _Linked(torch.autograd.Function):
    """Zeros on the CPU in place of a tensor without numbers; the graph goes on behind them."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """Return the zeros, which depend on all arguments."""
        return torch.zeros(source.shape, dtype=source.dtype)


class _Swap(NamedTuple):
    """A tensor that is another one while its module runs."""

    owned: dict[str, Any]
    """Parameters or buffers of its module."""
    name: str
    outside: torch.Tensor
    inside: torch.Tensor


class _Call(NamedTuple):
    """A call of something that owns weights."""

    name: str
    weights: tuple[str, ...]
    given: list[torch.Tensor]
    """What it was handed, where that has numbers."""


class _Run:
    """A model made ready to run without weights, and what is noted as it runs."""

    def __init__(self, model: nn.Module, blocks_path: str) -> None:
        self._model, self._path = model, blocks_path
        listed: Any = model.get_submodule(blocks_path)
        self._blocks: list[nn.Module] = list(listed)
        self._name_of = first_names(model)
        """Names by the identity of whatever stands for a tensor here."""
        self._names = {
            id(module): tuple(self._name_of[id(t)] for t in own_tensors(module).values())
            for module in model.modules()
        }
        """Names of the tensors that sit directly on each module."""
        self._kept: list[torch.Tensor] = []
        """Whatever has a place in `_name_of`, so that nothing else gets its identity."""
        self._prepare()
        self._forget()

    def _forget(self) -> None:
        """Forget what an earlier run has shown."""
        self._used: tuple[dict[str, None], dict[str, None]] = ({}, {})
        self._inputs: list[torch.Tensor] = []
        """The hidden state that enters each block, and that leaves the last one, with its graph."""
        self._output: Any = None
        self._calls: list[_Call] = []

    # ---- before the run ----

    def _prepare(self) -> None:
        inside = {id(m) for block in self._blocks for m in block.modules()}
        blocks = {id(block) for block in self._blocks}
        prepared: tuple[str, ...] = ()
        for name, module in list(self._model.named_modules()):
            if id(module) not in inside:
                module.register_forward_pre_hook(self._note)
            if name.startswith(prepared):
                continue
            is_block, is_around = id(module) in blocks, f"{self._path}.".startswith(f"{name}.")
            if is_around or not name:
                self._twins([module])
            elif is_block or own_tensors(module):
                prepared = (*prepared, f"{name}.")
                swaps = self._twins(module.modules())
                if is_block:
                    module.register_forward_pre_hook(self._enter, with_kwargs=True)
                    _swap(swaps, inside=True)
                    swaps = []
                weights = self._names[id(module)]
                module.forward = partial(self._shape_only, name, weights, module.forward, swaps)
        self._blocks[-1].register_forward_hook(self._leave)

    def _twins(self, modules: Iterable[nn.Module]) -> list[_Swap]:
        """Make a twin without numbers of every tensor of *modules*, for as long as they run.

        Meanwhile parameters are zeros: some models read those of a module without calling it.
        """
        swaps = []
        for module in modules:
            own = dict(zip(own_tensors(module), self._names[id(module)], strict=True))
            for owned in (module._parameters, module._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        swap = _Swap(owned, name, _outside(tensor), _without_numbers(tensor))
                        swaps.append(swap)
                        self._kept += [tensor, swap.outside, swap.inside]
                        if name in own:
                            ids = (id(tensor), id(swap.outside), id(swap.inside))
                            self._name_of |= dict.fromkeys(ids, own[name])
        _swap(swaps, inside=False)
        return swaps

    # ---- as it runs ----

    def _note(self, module: nn.Module, *_: object) -> None:
        used = self._used[0 if self._output is None else 1]
        used.update(dict.fromkeys(self._names[id(module)]))

    def _enter(self, _m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = hidden_of(args, kwargs)
        self._inputs.append(hidden)
        if args:
            return (hidden.detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden.detach()}

    def _leave(self, _m: nn.Module, _args: object, output: Any) -> Any:
        is_one = isinstance(output, torch.Tensor)
        hidden, *rest = (output,) if is_one else output
        self._output = output
        self._inputs.append(hidden)
        return hidden.detach() if is_one else (hidden.detach(), *rest)

    def _shape_only(
        self,
        name: str,
        weights: tuple[str, ...],
        forward: Callable[..., Any],
        swaps: Sequence[_Swap],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run *forward* on the meta device and answer zeros of the shape that comes out."""
        tensors = [t.detach() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self._calls.append(_Call(name, weights, [t for t in tensors if not t.is_meta]))
        _swap(swaps, inside=True)
        try:
            moved = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            out = forward(*moved[0], **moved[1])
        finally:
            _swap(swaps, inside=False)
        # What a block leaves in a dict for others is to be found there.
        for mine, its in zip(
            (*args, *kwargs.values()), (*moved[0], *moved[1].values()), strict=True
        ):
            if type(mine) is dict:
                mine |= {key: its[key] for key in its.keys() - mine.keys()}
        # Some tables of positions are looked up without a gradient, as they are not trained.
        others = [swap.inside for swap in swaps if swap.inside.is_floating_point()]
        link: Any = _Linked.apply
        return tree_map_only(torch.Tensor, lambda t: link(t, *others), out)

    # ---- after it ----

    def seen(self) -> Observed:
        """Run the model; see `watch`."""
        config: Any = self._model.config
        pad = config.get_text_config().pad_token_id
        one, other = [token for token in range(1, 4) if token != pad][:2]
        logits = self._call(one)
        if any(id(m) not in self._names for block in self._blocks for m in block.modules()):
            kind = type(self._model).__name__
            raise ModelError(f"{kind} makes parts of its blocks anew while it runs")
        needs = [self._reached(hidden) for hidden in self._inputs]
        tail_needs = self._reached(logits)
        blocks = [
            {name for module in block.modules() for name in self._names[id(module)]}
            for block in self._blocks
        ]
        own = set().union(*blocks)
        front = {n: None for n in (*self._used[0], *sorted(set().union(*needs) - own))}
        tail = {n: None for n in (*self._used[1], *sorted(tail_needs - own))}
        seen = Observed(
            front=tuple(front),
            tail=tuple(tail),
            needs=tuple(frozenset(n - b) for n, b in zip(needs[1:], blocks, strict=True)),
            tail_needs=frozenset(tail_needs),
            returned=0 if isinstance(self._output, torch.Tensor) else len(self._output),
            hidden_shape=tuple(self._inputs[0].shape),
            ids_matter=False,
        )
        late = set().union(*seen.needs[1:])
        before = self._by_ids(late)
        if late or any(_may_be_ids(t) for call in before for t in call.given):
            self._forget()
            self._call(other)
            after = self._by_ids(late)
            return seen._replace(ids_matter=not _same(before, after))
        return seen

    def _call(self, token: int) -> torch.Tensor:
        """Run the model on sequences of *token*; returns its logits."""
        kind = type(self._model).__name__
        ids_BT = torch.full((ROWS, POSITIONS), token)
        try:
            with torch.enable_grad():
                output = self._model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
        except Exception as error:  # noqa: BLE001 - somebody else's model code may raise anything
            raise ModelError(f"{kind} cannot be traced: {one_line(error)}") from error
        called = [call.name for call in self._calls if call.name.startswith(f"{self._path}.")]
        wanted = [f"{self._path}.{i}" for i in range(len(self._blocks))]
        if called != wanted:
            times = "never" if not called else "not one after the other, once each"
            raise ModelError(f"{kind}: its blocks at {self._path!r} are called {times}")
        if len(self._inputs) != len(wanted) + 1:
            raise ModelError(
                f"{kind}: its blocks hide what they are given: they are not called as modules are"
            )
        logits: torch.Tensor = output.logits
        return logits

    def _reached(self, tensor: torch.Tensor) -> set[str]:
        """Return the names of all tensors that the graph of *tensor* leads to."""
        if tensor.grad_fn is None:
            return {self._name_of[id(tensor)]} if id(tensor) in self._name_of else set()
        found, seen, waiting = set(), set(), [tensor.grad_fn]
        while waiting:
            node: Any = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable") and id(node.variable) in self._name_of:
                found.add(self._name_of[id(node.variable)])
            waiting += [following for following, _ in node.next_functions]
        return found

    def _by_ids(self, late: set[str]) -> list[_Call]:
        """Return the calls whose arguments would differ if blocks after the first saw the ids."""
        first = f"{self._path}.0"
        return [
            call
            for call in self._calls
            if (call.name.startswith(f"{self._path}.") and call.name != first)
            or late.intersection(call.weights)
        ]


def _may_be_ids(tensor: torch.Tensor) -> bool:
    """Return whether integers are no positions; most blocks are handed these."""
    if tensor.dtype not in (torch.int32, torch.int64):
        return False
    positions = torch.arange(POSITIONS)
    return tensor.shape[-1:] != positions.shape or bool((tensor != positions).any())


def _same(before: Sequence[_Call], after: Sequence[_Call]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(
        len(a.given) == len(b.given)
        and all(torch.equal(x, y) for x, y in zip(a.given, b.given, strict=True))
        for a, b in pairs
    )


def _swap(swaps: Sequence[_Swap], *, inside: bool) -> None:
    for swap in swaps:
        swap.owned[swap.name] = swap.inside if inside else swap.outside


def _outside(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a tensor is while its module does not run: a parameter is a single zero."""
    if not isinstance(tensor, nn.Parameter):
        return tensor
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(zeros, requires_grad=zeros.is_floating_point())


def _without_numbers(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.data.to("meta"), requires_grad=tensor.is_floating_point())
    return tensor.to("meta")

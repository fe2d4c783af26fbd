"""How much each frozen weight matters to the loss: HSplitLoRA's gradient-weight product (RNGWP).

The paper (arXiv 2505.02795) gives, for a weight W with entries w_j and the cost C(W) of tuning it,

    Theta(W) = (sum_j w_j dL/dw_j) / C(W)

and speaks of the magnitude of the product. Where that magnitude is taken cannot be seen:
RECONSTRUCTED, and therefore a choice of three forms. With inputs x_t and output gradients d_t of
tokens t, on the frozen W alone (no bias, no adapter, no residual):

    reference   sum_j |w_j dL/dw_j|      one more product of W's size per micro-batch
    free        sum_t |<d_t, W x_t>|     from what the backward pass computes anyway
    signed      |sum_t <d_t, W x_t>|     = |sum_j w_j dL/dw_j|, the other reading of the paper

Where a layer's weight is W + U V, with a residual inside, the part of U V is taken out again.
Measured while a model trains, and only then: between measurements nothing hangs on it. Knows no
network and no planner: costs come from there.

Legend: B sequences, T positions, N tokens of a micro-batch, I inputs, O outputs, S rank of U V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.lora.factors import Factors

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch
    from torch import nn

    from edge_sdk.model.experts import Matrix

    Inside: TypeAlias = tuple[torch.Tensor, torch.Tensor] | None

Form = Literal["free", "reference", "signed"]
Share = float | Mapping[str, float]
"""Share of the samples that a participant stands for: of all weights, or weight by weight."""

# Ours (RECONSTRUCTED): without a floor an importance of 0 would divide by 0, and without a cap one
# spike would hold an old value for ever.
FLOOR = 1e-12
MOST_GAMMA = 0.999
# The reference form costs about two fifths of a step: measured every second time only, it stays
# below 3 % of the run at K = 10 (docs/importance.md).
REFERENCE_PERIODS = 2
# Numbers that are multiplied at a time: 1 MiB stays in a processor's cache (512 x 3072 then take
# 0.7 ms instead of 1.8 ms on one), and no second copy of an activation is ever made.
CHUNK = 1 << 18
# Stretches in which a residual is taken out of a weight, so that no copy of the whole is made.
PARTS = 8


class ImportanceAccumulator:
    """Importance of each weight: added up over a step's micro-batches, averaged over steps."""

    def __init__(self, weights: Iterable[str], form: Form = "free", every: int = 0) -> None:
        """Count for *weights*, adapted or not, by module name; see `measure`."""
        self.weights = tuple(weights)
        self._raw: dict[str, Any] = {}
        self._found: dict[str, tuple[float, int]] = {}
        self.measure(form, every)

    def measure(self, form: Form, every: int) -> None:
        """Measure at every *every*-th step from now on; 0 never does.

        The form `reference` is measured at every second of these steps.

        Raises:
            ConfigError: there is no such form, or *every* is negative.
        """
        if form not in get_args(Form) or every < 0:
            raise ConfigError(
                f"importance: {form!r} every {every} steps is not possible; "
                f"choose one of {', '.join(get_args(Form))}, and 0 or more steps"
            )
        self.form = form
        self._every = every * (REFERENCE_PERIODS if form == "reference" else 1)
        self.forget()

    def is_due(self, step: int) -> bool:
        """Return whether *step* is measured."""
        return bool(self._every) and step % self._every == 0

    def add(self, name: str, value: Any) -> None:
        """Take in one micro-batch's share of a weight's importance, a number or a scalar tensor."""
        self._raw[name] = self._raw[name] + value if name in self._raw else value

    def close_step(self, step: int, divisor: Callable[[str], float] = lambda _: 1.0) -> None:
        """Take *step* in, if it was measured; call it when all its backward passes are done.

        Args:
            step: The step that is over.
            divisor: What the gradients of a weight were multiplied by: a loss scale, samples; 0
                for a weight that nobody's tokens went through.
        """
        raw, self._raw = self._raw, {}
        if not self.is_due(step):
            return
        values = {}
        for name in self.weights:
            if by := divisor(name):
                values[name] = abs(float(raw[name])) / by if name in raw else 0.0
        if all(map(math.isfinite, values.values())):  # float16 that overflows is no measurement
            for name, value in values.items():
                total, count = self._found.get(name, (0.0, 0))
                self._found[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """Return the mean per measured step since the last call, not divided by any cost."""
        found, self._found = self._found, {}
        return {name: total / count for name, (total, count) in found.items()}

    def forget(self) -> None:
        """Drop what has been measured; the steps since the last `take` count nothing."""
        self._raw, self._found = {}, {}

    def drop_step(self) -> None:
        """Drop what backward passes of an open step have measured."""
        self._raw = {}

    def state(self) -> dict[str, np.ndarray]:
        """Return what `take` would give, as sum and count, for a checkpoint between two steps."""
        return {name: np.array(found, np.float64) for name, found in self._found.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self.forget()
        self._found = {n: (float(s[0]), int(s[1])) for n, s in state.items() if n in self.weights}


class ImportanceMeter(ImportanceAccumulator):
    """Measures the importance of a torch model's weights at every K-th step, while it trains."""

    def __init__(
        self,
        model: nn.Module,
        weights: Iterable[str],
        form: Form = "free",
        every: int = 0,
        *,
        folded: Mapping[str, Factors] = MappingProxyType({}),
    ) -> None:
        """Take the layers of *model* to measure; see `ImportanceAccumulator`.

        Args:
            model: Has the layers.
            weights: Their names.
            form: What is measured.
            every: How often.
            folded: What is inside their frozen weights and does not count, by weight; looked at
                whenever something is measured.
        """
        super().__init__(weights, form, every)
        self._model, self._folded = model, folded
        self._watched: int | None = None
        """The step whose forward passes were followed last."""

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Follow a forward pass of *step*, if one is due; its backward pass then measures.

        Several micro-batches of a step add up: exactly in the forms `free` and `signed`; in
        `reference` each is a gradient of its own.
        """
        if not self.is_due(step):
            yield
            return
        if step != self._watched:
            self._watched, self._raw = step, {}
        from edge_sdk.model.experts import expert_weights

        stacks = expert_weights(self._model)
        with ExitStack() as hooks:
            for name in self.weights:
                hooks.enter_context(self._follow(name, is_stack=name in stacks))
            yield

    @contextmanager
    def _follow(self, name: str, *, is_stack: bool) -> Iterator[None]:
        """Follow one weight: a linear layer, or every matrix of a stack of experts."""
        from edge_sdk.model.experts import take_place
        from edge_sdk.model.layout import is_transposed

        add = partial(self.add, name)
        inside = _tensors(
            self._folded.get(name), self._model.get_submodule(name.rpartition(".")[0])
        )
        if is_stack:
            stack = take_place(self._model, name)
            stack.watch = partial(_follow_matrix, self.form, add, inside)
            try:
                yield
            finally:
                stack.watch = None
            return
        layer = base_of(self._model.get_submodule(name))
        weight = partial(weight_of, layer)
        watch = _Watch(weight, is_transposed(layer), self.form, add, inside)
        with (
            layer.register_forward_pre_hook(watch.before),
            layer.register_forward_hook(watch.after),
        ):
            yield

    def measured(self, step: int) -> list[torch.Tensor | None]:
        """Return what *step* has measured of each weight so far; None of what nothing went through.

        Another meter of the same weights adds its own to it, and `take_over` goes on.
        """
        import torch

        raw = self._raw if step == self._watched else {}
        return [torch.as_tensor(raw[n]).float() if n in raw else None for n in self.weights]

    def take_over(self, step: int, measured: Iterable[torch.Tensor | None]) -> None:
        """Let *measured*, of each weight, be what *step* has measured so far."""
        found = zip(self.weights, measured, strict=True)
        self._watched = step
        self._raw = {name: value.reshape(()) for name, value in found if value is not None}

    def close_step(self, step: int, divisor: Callable[[str], float] = lambda _: 1.0) -> None:
        """Take *step* in, if it was followed; see `ImportanceAccumulator`."""
        import torch

        if step == self._watched:
            if self._raw:  # at once: each single one would be waited for
                values = torch.stack(list(self._raw.values())).tolist()
                self._raw = dict(zip(self._raw, values, strict=True))
            super().close_step(step, divisor)


class _Watch:
    """Follows one layer through a forward pass and hands its importance on in the backward pass.

    What it keeps in between is the layer's input, which autograd keeps as well where the layer has
    an adapter: <d_t, W x_t> = <W^T d_t, x_t>, and W^T d_t is what the layer's backward pass
    computes. Where the input needs no gradient (the first layers after frozen embeddings), that is
    not computed: there the output is kept instead.
    """

    def __init__(
        self,
        weight: Callable[[], torch.Tensor],
        is_transposed: bool,
        form: Form,
        add: Callable[[torch.Tensor], None],
        inside: Inside = None,
    ) -> None:
        """Follow a layer that computes x W^T, or x W where its weight *is_transposed*.

        *inside* is what to leave out of it: (U, V) as the product is x (U V)^T.
        """
        self._weight, self._is_transposed = weight, is_transposed
        self._form, self._add, self._inside = form, add, inside
        self._less_N: torch.Tensor | None = None

    def before(self, _layer: object, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Watch the gradient by the input, in this layer's part of it alone."""
        x = args[0]
        if self._form == "reference" or not _has_gradient(x):
            return None
        own: Any = x.view_as(x)
        own.register_hook(partial(self._dot, [x.detach()]))
        return (own, *args[1:])

    def _take_out(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Subtract <d_t, U V x_t> of each token from <W^T d_t, x_t>, which comes after it."""
        if self._inside is None:
            return
        u_OS, v_SI = self._inside
        down_NS: Any = (x.detach().float() @ v_SI.T).flatten(0, -2)

        def keep(grad: torch.Tensor) -> None:
            self._less_N = ((grad.float() @ u_OS).flatten(0, -2) * down_NS).sum(-1)

        hooked: Any = y
        hooked.register_hook(keep)

    def after(self, layer: object, args: tuple[Any, ...], y: torch.Tensor) -> Any:
        """Watch the gradient by the output, which this makes exist where nothing below needs it."""
        import torch

        if self._form != "reference" and _has_gradient(args[0]):
            self._take_out(args[0], y)
            return None
        if not torch.is_grad_enabled():
            return None
        watched: Any = y if y.requires_grad else y.detach().requires_grad_(True)
        if self._form == "reference":
            watched.register_hook(partial(self._dense, [args[0].detach()]))
        else:
            bias = getattr(layer, "bias", None)
            plain = y.detach() if bias is None else y.detach() - bias
            if self._inside is not None:
                u_OS, v_SI = self._inside
                plain = plain.float() - (args[0].detach().float() @ v_SI.T) @ u_OS.T
            watched.register_hook(partial(self._dot, [plain]))
        return watched

    def _dot(self, kept: list[torch.Tensor], grad: torch.Tensor) -> None:
        """Add up <W^T d_t, x_t>, or <d_t, W x_t>, of each token."""
        x_NI: Any = kept.pop().flatten(0, -2)
        grad_NI: Any = grad.flatten(0, -2)
        rows = max(1, CHUNK // x_NI.shape[1])
        less, self._less_N = self._less_N, None
        for i, (x, g) in enumerate(zip(x_NI.split(rows), grad_NI.split(rows), strict=True)):
            dots_N = (g.float() * x.float()).sum(-1)
            if less is not None:
                dots_N -= less[i * rows : (i + 1) * rows]
            self._add((dots_N if self._form == "signed" else dots_N.abs()).sum())

    def _dense(self, kept: list[torch.Tensor], grad: torch.Tensor) -> None:
        """Add up |w_j g_j|; the dense gradient lives in here alone."""
        weight = self._weight()
        x_NI, d_NO = kept.pop().flatten(0, -2).float(), grad.flatten(0, -2).float()
        product = x_NI.T @ d_NO if self._is_transposed else d_NO.T @ x_NI
        if self._inside is None:
            product.mul_(weight)
        else:
            left, right = (
                (f.T for f in reversed(self._inside)) if self._is_transposed else self._inside
            )
            stretches = (t.tensor_split(PARTS) for t in (product, weight, left))
            for own, whole, rows in zip(*stretches, strict=True):
                own.mul_(whole - rows @ right)
        self._add(product.abs_().sum())


def _follow_matrix(
    form: Form,
    add: Callable[[torch.Tensor], None],
    inside: Inside,
    x: torch.Tensor,
    matrix: Matrix,
    is_turned: bool,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Follow one expert's matrix through a product; see `edge_sdk.model.experts.Watch`."""
    if inside is not None:
        u_OS, v_SI = (factor[matrix.expert] for factor in inside)
        # The residual is that of M, (O, I), whichever way the product goes.
        inside = (u_OS, v_SI) if is_turned != matrix.is_transposed else (v_SI.T, u_OS.T)
    watch = _Watch(matrix.base, not is_turned, form, add, inside)
    args = watch.before(None, (x,)) or (x,)

    def leave(y: torch.Tensor) -> torch.Tensor:
        watched: torch.Tensor | None = watch.after(None, args, y)
        return y if watched is None else watched

    return args[0], leave


def _tensors(factors: Factors | None, beside: nn.Module) -> Inside:
    """Return U and V where the parameters of *beside* lie; None without a rank."""
    import torch

    if factors is None or not factors.rank:
        return None
    where = next((p.device for p in beside.parameters()), torch.device("cpu"))
    u, v = (torch.from_numpy(np.ascontiguousarray(factor)).to(where) for factor in factors)
    return u, v


def _has_gradient(x: torch.Tensor) -> bool:
    import torch

    return x.requires_grad and torch.is_grad_enabled()


def base_of(layer: nn.Module) -> nn.Module:
    """Return the frozen layer itself, where *layer* is one that PEFT has wrapped."""
    base: nn.Module = getattr(layer, "base_layer", layer)
    return base


def weight_of(layer: nn.Module) -> torch.Tensor:
    """Return the weight of a linear layer as its forward pass uses it, dense.

    A quantised layer of any make has a method `dequantize`, or is one that PEFT knows; a copy is
    made then, which its user drops before asking for the next.
    """
    from peft.utils.integrations import dequantize_module_weight

    dequantize = getattr(layer, "dequantize", None)
    dense: Any = dequantize_module_weight(layer) if dequantize is None else dequantize()
    weight: torch.Tensor = dense.detach()
    return weight


# ---- arithmetic on what was measured -------------------------------------------------------------


def combine(reports: Mapping[str, tuple[Share, Mapping[str, float]]]) -> dict[str, float]:
    """Return the global importance: mean over those who held a weight, by their shares p.

    Args:
        reports: By participant its share, and its values by weight. The coordinator's share of a
            weight is that of the devices whose split lies below it, hence weight by weight.
    """
    terms: dict[str, list[tuple[float, float]]] = {}
    for participant in sorted(reports):  # float addition is not associative
        share, values = reports[participant]
        shares = share if isinstance(share, Mapping) else dict.fromkeys(values, share)
        for name, value in values.items():
            if (own := shares.get(name, 0.0)) > 0:
                terms.setdefault(name, []).append((own, value))
    return {
        name: sum(p * value for p, value in terms[name]) / sum(p for p, _ in terms[name])
        for name in sorted(terms)
    }


class Smoothing:
    """Importance over the rounds of a run, weight by weight, as in the paper.

        I_t = g I_(t-1) + (1 - g) Theta_t,    g = 1 - exp(-(Theta_t t) / (I_(t-1) T))

    Early g is near 0, so that history counts little; later a spike pushes g towards 1 and is held
    back, while a fall pushes it towards 0 and is accepted at once. RECONSTRUCTED: I_1 = Theta_1,
    also for a weight that first appears later; I is at least *floor*; g is at most *most_gamma*
    (1.0 is the paper's formula as printed).
    """

    def __init__(self, floor: float = FLOOR, most_gamma: float = MOST_GAMMA) -> None:
        self._floor, self._most_gamma = floor, most_gamma
        self.values: dict[str, float] = {}
        """I of every weight that was ever measured, by name."""

    def update(self, values: Mapping[str, float], t: int, T: int) -> dict[str, float]:  # noqa: N803
        """Take in Theta of round *t* (from 1) of *T*; returns I of all weights.

        A weight that was not measured this time keeps its value.
        """
        if not 1 <= t <= T:
            raise ValueError(f"round t must be in 1..{T}, got {t}")
        for name, theta in values.items():
            old = self.values.get(name)
            new = theta if old is None else self._mixed(old, theta, t / T)
            self.values[name] = max(new, self._floor)
        return dict(sorted(self.values.items()))

    def _mixed(self, old: float, theta: float, progress: float) -> float:
        gamma = min(1.0 - math.exp(-theta * progress / old), self._most_gamma)
        return gamma * old + (1.0 - gamma) * theta

    def state(self) -> dict[str, np.ndarray]:
        """Return everything as arrays, for a checkpoint."""
        return {name: np.array(value, np.float64) for name, value in self.values.items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self.values = {name: float(state[name]) for name in sorted(state)}

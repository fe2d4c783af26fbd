"""Measured, not believed: how fast matrix products and one real block run here, how much fits.

Imports torch and transformers inside the functions that need them. Not here: the link, which only
its two ends can measure, and what a plan will need (`estimate/memory.py`).

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.profile import DeviceProfile
from profiler.sensors.board import board, native_bf16, power_mode
from profiler.sensors.memory import peak_rss, reset_peak_rss, rss
from profiler.sensors.memory_budget import budget, gpu_memory, pool
from profiler.sensors.readings import Reading, unknown
from profiler.sensors.sources import HERE, Sources

# The first run compiles kernels, fills caches and raises clocks, and stands for nothing.
WARM_UPS = 1
# An odd number, so that the median is one of them; more while they are short.
LEAST_RUNS, MOST_RUNS = 3, 31
ENOUGH_S = 1.0
DTYPES = ("float32", "bfloat16", "float16")
# A matrix product of this length is long beside its launch and short beside a coffee.
GEMM_ENOUGH_S = 0.02
FIRST_GEMM_SIZE, LAST_GEMM_SIZE = 128, 4096

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockMeasure:
    """One transformer block, forward and backward to its input, its weights frozen."""

    seconds: Reading
    """Median time of forward and backward."""
    flops: float
    """Floating-point operations of both, as torch counts them: 2 for each multiply-add."""
    flops_per_s: Reading
    weight_bytes: float
    peak_bytes: Reading
    """Memory beyond the weights at the peak: activations, gradients, buffers."""


def seconds_of(run: Callable[[], None], clock: Clock = time.perf_counter) -> Reading:
    """Return the median time of *run* in s, after a warm-up; the GPU's work is waited for."""
    for _ in range(WARM_UPS):
        _timed(run, clock)
    times: list[float] = []
    while len(times) < LEAST_RUNS or (
        len(times) < MOST_RUNS and (sum(times) < ENOUGH_S or len(times) % 2 == 0)
    ):
        times.append(_timed(run, clock))
    middle = statistics.median(times)
    spread = (max(times) - min(times)) / middle if middle else 0.0
    return Reading(middle, f"median of {len(times)}, spread {100 * spread:.0f} %", "s")


def _timed(run: Callable[[], None], clock: Clock) -> float:
    began = clock()
    run()
    cuda = HERE.loaded_cuda()
    if cuda is not None:
        cuda.synchronize()
    return clock() - began


def measure_step(
    run: Callable[[], None], flops: float, clock: Clock = time.perf_counter
) -> Reading:
    """Return the speed of *run* in FLOP/s.

    Args:
        run: One forward and backward; it is called several times and must not change its work.
        flops: Floating-point operations of one call.
        clock: Seconds, for tests.
    """
    seconds = seconds_of(run, clock)
    return _rate(flops, seconds)


def _rate(flops: float, seconds: Reading) -> Reading:
    if not seconds.value:
        return unknown("FLOP/s")
    return Reading(flops / seconds.value, seconds.source, "FLOP/s")


# ---- matrix products -----------------------------------------------------------------------------


def gemm_rates(device: str = "cpu", sources: Sources = HERE) -> dict[str, Reading]:
    """Return the speed of square products in FLOP/s by dtype; None where it is not real.

    Args:
        device: Name of the device, as torch calls it.
        sources: What tells whether bfloat16 is emulated by the GPU.
    """
    rates = {}
    for name in DTYPES:
        if name == "bfloat16" and device != "cpu" and native_bf16(sources).value is False:
            rates[name] = Reading(None, "only emulated by this GPU", "FLOP/s")
            continue
        try:
            rates[name] = _gemm_rate(name, device)
        except (RuntimeError, NotImplementedError):  # no kernel for this dtype
            rates[name] = Reading(None, "not supported", "FLOP/s")
    return rates


def _gemm_rate(dtype: str, device: str) -> Reading:
    import torch

    size = FIRST_GEMM_SIZE
    while True:
        a = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
        out = torch.empty_like(a)

        def run(a: Any = a, out: Any = out) -> None:
            torch.mm(a, a, out=out)

        _timed(run, time.perf_counter)
        once = _timed(run, time.perf_counter)
        if once >= GEMM_ENOUGH_S or size >= LAST_GEMM_SIZE:
            seconds = seconds_of(run)
            rate = _rate(2.0 * size**3, seconds)
            return rate._replace(source=f"{size} x {size}, {seconds.source}")
        size *= 2


# ---- one real block ------------------------------------------------------------------------------


def measure_block(
    model: Path | str,
    *,
    rows: int = 4,
    length: int = 128,
    dtype: str = "float32",
    device: str = "cpu",
) -> BlockMeasure:
    """Run the first block of a model with random weights, forward and backward to its input.

    Args:
        model: Folder with the model's `config.json`; its weights are not needed.
        rows: Sequences (B).
        length: Positions (T).
        dtype: Dtype of weights and activations.
        device: Name of the device, as torch calls it.

    Raises:
        ValueError: The folder holds no config that transformers can build, or *length* is more
            than the model can take.
    """
    import torch

    block = _one_block(model, length).to(device=device, dtype=getattr(torch, dtype))
    run = _forward_backward(block, rows, length)
    flops = rows * _flops(block, length)
    with _peak(device) as peak:
        seconds = seconds_of(run)
    gc.collect()
    return BlockMeasure(
        seconds=seconds,
        flops=flops,
        flops_per_s=_rate(flops, seconds),
        weight_bytes=float(sum(p.numel() * p.element_size() for p in block.parameters())),
        peak_bytes=peak[0],
    )


def _one_block(model: Path | str, length: int) -> Any:
    """Build the model with one block and next to no vocabulary, which is not what is measured."""
    from transformers import AutoConfig, AutoModel

    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"model: no config.json in {str(model)!r}; name the folder of a model")
    try:
        config = AutoConfig.from_pretrained(
            model, trust_remote_code=False, local_files_only=True
        ).get_text_config()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model: config.json in {str(model)!r} is of no use: {reason}") from error
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"length must be 1..{longest}, the positions of this model, got {length}")
    settings = config.to_dict()
    kind = settings.pop("model_type")
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = 1
    settings |= {"vocab_size": 8, "use_cache": False}
    settings |= {name: 0 for name in settings if name.endswith("_token_id")}
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:1]
    factory: Any = AutoModel
    built: Any = factory.from_config(
        AutoConfig.for_model(kind, **settings), trust_remote_code=False
    )
    return built.eval().requires_grad_(False)


def _forward_backward(block: Any, rows: int, length: int) -> Callable[[], None]:
    import torch

    embeddings = block.get_input_embeddings()
    h_BTD = torch.randn(
        rows,
        length,
        embeddings.embedding_dim,
        dtype=embeddings.weight.dtype,
        device=embeddings.weight.device,
        requires_grad=True,
    )

    def run() -> None:
        h_BTD.grad = None
        block(inputs_embeds=h_BTD).last_hidden_state.sum().backward()

    return run


def _flops(block: Any, length: int) -> float:
    """Count operations of one sequence; with plain attention, as torch counts no other on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    fast = block.config._attn_implementation
    block.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter:
        _forward_backward(block, 1, length)()
    block.set_attn_implementation(fast)
    return float(counter.get_total_flops())


@contextmanager
def _peak(device: str) -> Iterator[list[Reading]]:
    """Let the first item of the list become the memory taken inside at its peak."""
    found = [unknown("B")]
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found[0] = Reading(torch.cuda.max_memory_allocated() - before, "torch", "B")
        return
    resident, is_new = rss().value, reset_peak_rss()
    yield found
    most = peak_rss()
    if is_new and resident is not None and most.value is not None:
        found[0] = Reading(max(0.0, most.value - resident), most.source, "B", estimated=True)


# ---- a device ------------------------------------------------------------------------------------


def measure_profile(
    sources: Sources = HERE,
    *,
    device: str = "cpu",
    memory_bytes: float | None = None,
    overhead_bytes: float | None = None,
    flops_per_s: float | None = None,
) -> DeviceProfile:
    """Return what a run may use of this device; the link is not known here.

    Call it once the libraries are loaded and before any part of the model is.

    Args:
        sources: Where to look.
        device: Name of the device that computes, as torch calls it.
        memory_bytes: A budget set by hand instead of what is free now.
        overhead_bytes: What the process takes without a model; None: what it takes now.
        flops_per_s: What `measure_step` or `measure_block` has found.

    Raises:
        ValueError: *memory_bytes* is more than the device has.
    """
    on_gpu = device != "cpu"
    allowed = budget(sources, on_gpu=on_gpu, by_hand=memory_bytes)
    total = pool(sources, on_gpu=on_gpu).total
    if overhead_bytes is None:
        # A GPU's own memory holds no libraries, and what its context takes is no longer free.
        has_own = on_gpu and gpu_memory(sources).total.value is not None
        overhead_bytes = 0.0 if has_own else rss(sources.root).value
    name, mode, bf16 = board(sources).value, power_mode(sources).value, native_bf16(sources).value
    return DeviceProfile(
        board=name if isinstance(name, str) else None,
        memory_bytes=allowed.value,
        total_memory_bytes=total.value,
        overhead_bytes=overhead_bytes,
        flops_per_s=flops_per_s,
        power_mode=mode if isinstance(mode, str) else None,
        native_bf16=bf16 if isinstance(bf16, bool) else None,
    )

"""The tables of docs/scaling.md: on paper, from operations, bytes and data sheets.

    python scripts/scaling_tables.py

Nothing is run and no weights are read. `scripts/docs` writes the tables into the page, so that the
page and the estimates of `coordinator plan` cannot part.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coordinator.lab.simulation.boards import Scale, catalogue, free_bytes
from coordinator.lab.simulation.config import FleetConfig
from edge_sdk.model.precision import Base, base_widths
from edge_sdk.protocol.codecs import find
from profiler.estimate.flops import estimate_flops
from profiler.estimate.memory import estimate_memory, hidden_bytes
from profiler.estimate.sizes import Kept, Linear, ModelShape, Work

GPU = "h100-80gb"
# Share of a peak that training reaches, of boards and of the GPU: that of simulations.
DEFAULTS = {field.name: field.default for field in fields(FleetConfig)}
UTILISATION = DEFAULTS["utilisation"]
# What the process of a device takes before any part of the model.
OVERHEAD_BYTES = int(DEFAULTS["overhead_bytes"])
# Sequences of a device in a step, tokens of each, rank of every linear layer of every block.
SEQUENCES, LENGTH, RANK = 4, 512, 8
# Bits a second of the coordinator's network card, for each GPU.
NIC_BITS_PER_S = 25e9
# Measured, and named on the page: seconds of one core that a device-step costs the coordinator's
# process beside the model and beside its bytes; bytes a second that one process moves, encrypted,
# in tensors of 16 MiB; bytes of its memory that a session takes.
DEVICE_STEP_S, PROCESS_BYTES_PER_S, SESSION_BYTES = 0.69e-3, 0.87e9, 0.27 * 2**20
# A cap of the ranks of what has been learned, where there is one (`max_rank`).
CAP = 64
MIB, GIB = 2**20, 2**30


def llama(
    *,
    hidden: int,
    intermediate: int,
    blocks: int,
    heads: int,
    kv_heads: int,
    vocab: int = 32_000,
    kept: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> ModelShape:
    """Return the sizes of a Llama whose head is not tied to its embeddings.

    *kept* is what `edge_sdk/model/shape.py` observes of a block that computes in 16 bits: bytes
    kept for a token, and bytes that come and go for one with a base in 16 and in 32 bits.
    """
    kv = hidden // heads * kv_heads
    linears = (
        Linear("self_attn.q_proj", hidden, hidden, 0, 3),
        Linear("self_attn.k_proj", kv, hidden, 0, 3),
        Linear("self_attn.v_proj", kv, hidden, 0, 3),
        Linear("self_attn.o_proj", hidden, hidden, 1, input_is_kept=True),
        Linear("mlp.gate_proj", intermediate, hidden, 2, 2),
        Linear("mlp.up_proj", intermediate, hidden, 2, 2),
        Linear("mlp.down_proj", hidden, intermediate, 3),
    )
    per_token, freed, freed_beside_copies = kept
    num_weights = sum(linear.num_weights for linear in linears)
    return ModelShape(
        num_blocks=blocks,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        vocab_size=vocab,
        linears=linears,
        block_params=num_weights + 2 * hidden,
        front_params=vocab * hidden,
        tail_params=vocab * hidden + hidden,
        tail_needs_front=False,
        num_labels=0,
        blocks_path="model.layers",
        head_dim=hidden // heads,
        kept=(
            Kept(
                base_bytes=2,
                compute_bytes=2,
                per_token=per_token,
                per_pair=2.0,
                freed_per_token=freed,
            ),
            Kept(
                base_bytes=4,
                compute_bytes=2,
                per_block=2.0 * num_weights,  # autocast's copies
                per_token=per_token,
                per_pair=2.0,
                freed_per_token=freed_beside_copies,
            ),
        ),
    )


MODELS = {
    "LLaMA-2-7B": llama(
        hidden=4096,
        intermediate=11008,
        blocks=32,
        heads=32,
        kv_heads=32,
        kept=(131_720.0, 226_832.0, 333_328.0),
    ),
    "LLaMA-2-70B": llama(
        hidden=8192,
        intermediate=28672,
        blocks=80,
        heads=64,
        kv_heads=8,
        kept=(303_368.0, 406_544.0, 592_912.0),
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of device, and how the model is cut for it."""

    model: str
    board: str
    link: str
    blocks: int
    codec: str = "bfloat16"
    base: Base = "bfloat16"

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return MODELS[self.model]

    def work(
        self, *, is_device: bool, base: Base | None = None, sequences: int = SEQUENCES
    ) -> Work:
        """Return what one side does with the rows of this device in a step."""
        shape = self.shape
        width, linear = base_widths(base or self.base)
        first, stop = (0, self.blocks) if is_device else (self.blocks, shape.num_blocks)
        names = [
            f"{shape.blocks_path}.{b}.{li.name}" for b in range(first, stop) for li in shape.linears
        ]
        return Work(
            first=first,
            stop=stop,
            has_front=is_device,
            has_tail=not is_device,
            ranks=dict.fromkeys(names, RANK),
            micro_batch=sequences,
            length=LENGTH,
            base_bytes=width,
            linear_bytes=linear,
            compute_bytes=2,
            codec_bytes=find(self.codec).bytes_per_number,
            folds_residual=False,
        )

    @property
    def device_s(self) -> float:
        """Seconds in which the device computes a step."""
        speed = catalogue().boards[self.board].tflops * 1e12 * UTILISATION
        return estimate_flops(self.shape, self.work(is_device=True)).total / speed

    @property
    def gpu_s(self) -> float:
        """Seconds in which the GPU computes the rest of it."""
        speed = catalogue().boards[GPU].tflops * 1e12 * UTILISATION
        return estimate_flops(self.shape, self.work(is_device=False)).total / speed

    @property
    def wire_bytes(self) -> int:
        """Bytes of a step in each direction: hidden states up, their gradients down."""
        return hidden_bytes(self.shape, SEQUENCES, LENGTH, find(self.codec).bytes_per_number)

    @property
    def link_s(self) -> float:
        """Seconds of a step on the link, up and down one after the other."""
        link = catalogue().links[self.link]
        each = 1 / link.up_bytes_per_s + 1 / link.down_bytes_per_s
        return self.wire_bytes * each + link.round_trip_s

    @property
    def step_s(self) -> float:
        """Seconds of a step of a device that waits for nobody."""
        return self.device_s + self.link_s + self.gpu_s

    @property
    def served(self) -> int:
        """Devices that keep one GPU busy and wait for nobody: its operations are the bound."""
        return math.floor(self.step_s / self.gpu_s)

    @property
    def carried(self) -> int:
        """Devices whose bytes the network card carries; both directions at once."""
        return math.floor(self.step_s * NIC_BITS_PER_S / 8 / self.wire_bytes)

    @property
    def gateway_s(self) -> float:
        """Seconds in which one process of the coordinator is busy with the messages of a step."""
        return DEVICE_STEP_S + 2 * self.wire_bytes / PROCESS_BYTES_PER_S

    @property
    def handled(self) -> int:
        """Devices whose messages one process handles."""
        return math.floor(self.step_s / self.gateway_s)

    def gpus_for(self, devices: int) -> int:
        """Return the GPUs with which nobody waits: whole copies of the model, in bfloat16."""
        copy = self.gpus()
        return copy * math.ceil(devices / self.served / copy)

    def gpus(self, base: Base = "bfloat16") -> int:
        """Return the GPUs that hold the rest of the model, and the rows of one device beside it."""
        rest = estimate_memory(self.shape, self.work(is_device=False, base=base)).total
        return math.ceil(rest / free_bytes(catalogue().boards[GPU], Scale()))

    @property
    def is_held(self) -> bool:
        """Whether the device's memory is enough, by the estimate that plans are made with."""
        needed = estimate_memory(self.shape, self.work(is_device=True), OVERHEAD_BYTES).total
        return needed <= free_bytes(catalogue().boards[self.board], Scale())

    def adapter_bytes(self) -> int:
        """Return the bytes of the device's own factors, as float32."""
        return 4 * RANK * self.blocks * sum(linear.num_factors for linear in self.shape.linears)

    @property
    def learned_bytes(self) -> int:
        """Bytes of what all have learned of the whole model, once it has all ranks."""
        per_block = sum(li.most_rank * li.num_factors for li in self.shape.linears)
        return 4 * self.shape.num_blocks * per_block

    def handout_bytes(self, devices: int, cap: int | None = None) -> int:
        """Return the bytes that a device is given after a round of so many *devices* with `fedex`.

        Factors of its own rank, and the change of dW. From the second round on that is what dW is
        in the ranks that are kept, the *cap* or those of all, less what it was: twice as many.
        Where these are all ranks that a matrix can have nothing is cut, and the change is the sum
        of what each has, less what all had. A single device's own factors are all that there is.
        """
        kept, added = (cap or devices * RANK) if devices > 1 else RANK, (devices + 1) * RANK
        per_block = sum(
            min(2 * kept if kept < li.most_rank else added, li.most_rank) * li.num_factors
            for li in self.shape.linears
        )
        return self.adapter_bytes() + 4 * self.blocks * per_block


SMALL, LARGE = MODELS
SUPER, NX = "orin-nano-super-8gb", "orin-nx-16gb"
SERVED = [
    Case(SMALL, "raspberry-pi-5-8gb", "wifi-basic", 2),
    Case(SMALL, SUPER, "4g-good", 4),
    Case(SMALL, SUPER, "4g-good", 4, "int4"),
    Case(SMALL, SUPER, "wifi-good", 4),
    Case(SMALL, NX, "wifi-good", 8),
    Case(SMALL, "agx-orin-64gb", "wifi-good", 16),
    Case(SMALL, "agx-orin-64gb", "lan-1g", 24),
    Case(SMALL, "rtx-4060-laptop", "wifi-good", 4),
    Case(LARGE, SUPER, "wifi-good", 1),
    Case(LARGE, NX, "4g-good", 4),
    Case(LARGE, NX, "wifi-good", 4),
    Case(LARGE, "agx-orin-64gb", "wifi-good", 16),
    Case(LARGE, "thor-t5000", "lan-1g", 40),
]
FLEETS = [Case(SMALL, SUPER, "wifi-good", 4), Case(LARGE, NX, "wifi-good", 4)]
SELECTED = 500


def served_rows() -> Iterator[tuple[str, ...]]:
    """How many devices one GPU serves."""
    for case in SERVED:
        bounds = case.served, case.carried, case.handled
        yield (
            case.model,
            case.board,
            f"{case.blocks} of {case.shape.num_blocks}",
            f"{case.link}, {case.codec}",
            _number(case.device_s),
            _number(case.link_s),
            _number(case.gpu_s),
            f"**{bounds[0]:,}**",
            f"{bounds[1]:,}",
            f"{bounds[2]:,}",
        )


def fleet_rows() -> Iterator[tuple[str, ...]]:
    """What a fleet takes."""
    for case in FLEETS:
        for active in (SELECTED, 10_000, 100_000):
            yield (
                case.model,
                f"{active:,}",
                f"**{case.gpus_for(active):,}**",
                _number(active * SEQUENCES * LENGTH / case.step_s / 1e6),
                _number(active * case.wire_bytes * 8 / case.step_s / 1e9),
                f"{math.ceil(active * case.gateway_s / case.step_s):,}",
            )


def state_rows() -> Iterator[tuple[str, ...]]:
    """What the coordinator holds of a fleet beside the model, and what comes down to a device."""
    for case in FLEETS:
        for connected in (10_000, 100_000):
            for active in (connected, SELECTED):
                yield (
                    case.model,
                    f"{connected:,}",
                    f"{active:,}",
                    _number(connected * SESSION_BYTES / 1e9),
                    _number(active * case.adapter_bytes() / 1e9),
                    _number(case.learned_bytes / 1e9),
                    _number(case.handout_bytes(active) / 1e6),
                    _number(case.handout_bytes(active, CAP) / 1e6),
                    _number(case.adapter_bytes() / 1e6),
                )


def memory_rows() -> Iterator[tuple[str, ...]]:
    """What the coordinator's part takes of a GPU's memory."""
    bases: tuple[Base, ...] = ("float32", "bfloat16", "int8", "int4")
    for case in FLEETS:
        shape = case.shape
        for base in bases:
            empty = estimate_memory(shape, case.work(is_device=False, base=base, sequences=0))
            rows = estimate_memory(shape, case.work(is_device=False, base=base)).total - empty.total
            trained = empty.adapters + empty.gradients + empty.optimizer
            yield (
                case.model,
                f"{case.blocks} to {shape.num_blocks}",
                f"`{base}`",
                f"{empty.base / GIB:,.1f}",
                f"{trained / GIB:,.2f}",
                f"{rows / GIB:,.1f}",
                str(case.gpus(base)),
            )


def _number(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


Rows = Callable[[], Iterator[tuple[str, ...]]]
TABLES: dict[str, tuple[Sequence[str], Rows]] = {
    "served": (
        (
            *("model", "device", "blocks on it", "link, codec"),
            *("computes (s)", "on its link (s)", "H100 (s)"),
            *("devices by FLOPs", "by 25 Gbit/s", "by one process"),
        ),
        served_rows,
    ),
    "fleets": (
        (
            *("model", "train at a time", "H100s", "million tokens/s", "Gbit/s each way"),
            "processes for messages",
        ),
        fleet_rows,
    ),
    "state": (
        (
            *("model", "connected", "train at a time", "sessions (GB)"),
            *("uploads of a round (GB)", "`dW` at most (GB)"),
            *("down with `fedex` (MB)", "`max_rank: 64` (MB)", "`svd` (MB)"),
        ),
        state_rows,
    ),
    "memory": (
        (
            *("model", "blocks here", "`base`", "frozen (GiB)", "adapters and Adam (GiB)"),
            *("rows of one device (GiB)", "H100s at least"),
        ),
        memory_rows,
    ),
}


def main() -> None:
    """Print all tables."""
    for name, (head, rows) in TABLES.items():
        print(f"# {name}")
        for row in (head, *rows()):
            print(" | ".join(row))


if __name__ == "__main__":
    main()

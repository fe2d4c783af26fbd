"""What `gpu.py` measures: llama shapes with weights drawn where they are to lie, no checkpoint.

Both sides of the cut as the product makes them, and plain PEFT of the same blocks with the same
weights. Shapes are data: the tiny ones take the same way through the code, on the CPU.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coordinator.engine.interface import Job
from coordinator.engine.local import LocalEngine
from edge_sdk.data.batches import MicroBatch
from edge_sdk.lora.targets import LoraConfig, find_targets
from edge_sdk.model.layout import build_empty, find_layout
from edge_sdk.model.partition import Slice
from edge_sdk.model.precision import autocast, resolve_compute
from edge_sdk.model.quantized import resolve_base
from edge_sdk.protocol.plan import Plan
from edge_sdk.runtime.torch_runtime import TorchRuntime
from edge_sdk.runtime.training import TrainingConfig

LORA = LoraConfig(r=8, lora_alpha=16)
TRAINING = TrainingConfig(learning_rate=1e-4, lr_scheduler_type="constant")
# One step of it subtracts the gradient: what equality is shown by.
PLAIN_SGD = TrainingConfig(
    optimizer="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0
)
# As LLaMA's own weights: small enough that 32 blocks stay in range.
SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """A llama's sizes, and how it is cut."""

    name: str
    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int
    split: int
    """Blocks of each device."""

    @property
    def config(self) -> Any:
        """The config of transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            pad_token_id=0,
            use_cache=False,
            tie_word_embeddings=False,
        )


class Drawn(Mapping[str, torch.Tensor]):
    """Weights that are drawn when they are asked for: the same ones each time."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._names = [name for name, _ in model.named_parameters()]

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._model.get_parameter(name).shape
        if len(shape) == 1:  # of a norm
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(shape, dtype=self._dtype, device=self._device)
        return drawn.normal_(0.0, SPREAD, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Model:
    """A shape on a device."""

    def __init__(
        self, shape: Shape, device: torch.device, drawn: torch.dtype = torch.bfloat16
    ) -> None:
        """Draw weights as *drawn*, which bases are made of."""
        self.shape, self.device, self.config = shape, device, shape.config
        self.layout = find_layout(self.config, "causal-lm")
        self.targets = find_targets(self.config, "causal-lm", self.layout, LORA)
        self.weights = Drawn(build_empty(self.config, "causal-lm", drawn), device, drawn)

    def ranks(self, first: int, stop: int) -> dict[str, int]:
        """Rank of every weight of blocks first .. stop-1."""
        prefixes = tuple(f"{self.layout.blocks_path}.{i}." for i in range(first, stop))
        return {name: LORA.r for name in self.targets if name.startswith(prefixes)}

    def runtime(
        self, split: int, compute: Any, base: Any, training: TrainingConfig = TRAINING
    ) -> TorchRuntime:
        """The part of a device with *split* blocks."""
        blocks = [f"block.{i}" for i in range(split)]
        names = ["front", *blocks, *(["tail"] if split == self.shape.blocks else [])]
        ranks = self.ranks(0, split)
        plan = Plan(split=split, ranks=ranks, alphas={}, batch_size=1, micro_batch=1, tail=False)
        parts = {name: self.weights for name in names}
        torch.manual_seed(0)  # PEFT draws the first factors
        return TorchRuntime(
            self.config,
            "causal-lm",
            self.layout,
            parts,
            plan,
            LORA,
            training,
            1000,
            device=str(self.device),
            compute=compute,
            base=base,
        )

    def engine(
        self, first: int, compute: Any, base: Any, training: TrainingConfig = TRAINING
    ) -> LocalEngine:
        """The part of a coordinator from block *first* on, with the tail."""
        dtype, quantized = resolve_base(base, resolve_compute(compute, self.device))
        slice_ = Slice(self.config, "causal-lm", self.layout, dtype, self.device, quantized)
        for name in [*(f"block.{i}" for i in range(first, self.shape.blocks)), "tail"]:
            slice_.add(name, self.weights)
        ranks = self.ranks(first, self.shape.blocks)
        torch.manual_seed(0)
        return LocalEngine(
            slice_, first, ranks, LORA, training, 1000, trains_head=False, compute=compute
        )

    def micro(self, rows: int, length: int, seed: int = 0) -> MicroBatch:
        """Random token ids, all of them real, each of them a target."""
        ids_BT = np.random.default_rng(seed).integers(1, self.shape.vocab, (rows, length))
        return MicroBatch(ids_BT, np.full(rows, length, np.int32), ids_BT)

    def jobs(self, splits: list[int], rows: int, length: int) -> list[Job]:
        """What devices with these cuts send: random states of the size that blocks hand on."""
        generator = np.random.default_rng(0)
        size = (rows, length, self.shape.width)
        jobs = []
        for index, split in enumerate(splits):
            hidden_BTD = generator.standard_normal(size, np.float32)
            micro = self.micro(rows, length, seed=index)
            name, targets = f"d{index:02}", rows * (length - 1)
            jobs.append(
                Job(name, split, float(rows), targets, hidden_BTD, micro.lengths, micro.labels)
            )
        return jobs


class PlainPeft:
    """Blocks first .. stop-1 of a model with LoRA, by transformers and PEFT alone, in bfloat16.

    The base is bfloat16, the adapters are float32, products run under autocast: what Trainer does
    with `bf16: true`.
    """

    def __init__(self, model: Model, first: int, stop: int) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        self.device = model.device
        config = model.shape.config
        config.num_hidden_layers = stop - first
        with torch.device(self.device):
            whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                parameter.copy_(model.weights[_shifted(name, first)])
        lora = peft.LoraConfig(r=LORA.r, lora_alpha=LORA.lora_alpha, target_modules="all-linear")
        self.model: Any = peft.get_peft_model(whole, lora).train()
        self.inner: Any = whole.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=TRAINING.learning_rate, weight_decay=0.0
        )

    def step(self, loss: torch.Tensor, grad: torch.Tensor | None = None) -> None:
        """Go back from *loss*, or from a gradient by it, and update."""
        torch.autograd.backward(loss, grad)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train_tail(self, hidden_BTD: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        """A step from hidden states to the loss; also their gradient is computed."""
        entering = hidden_BTD.detach().requires_grad_(True)
        with autocast(torch.bfloat16, self.device):
            own = entering.to(torch.bfloat16)
            loss = self.model(inputs_embeds=own, labels=labels_BT, use_cache=False).loss
        self.step(loss)
        own_loss: torch.Tensor = loss.detach()
        return own_loss

    def train_front(self, ids_BT: torch.Tensor, grad_BTD: torch.Tensor) -> None:
        """A step from token ids to hidden states, and back from their gradient."""
        with autocast(torch.bfloat16, self.device):
            hidden = self.inner(input_ids=ids_BT, use_cache=False).last_hidden_state
        self.step(hidden, grad_BTD.to(hidden.dtype))


def _shifted(name: str, first: int) -> str:
    """Return the whole model's name of a weight of the model that begins at block *first*."""
    path, found, rest = name.partition("model.layers.")
    if not found:
        return name
    index, _, leaf = rest.partition(".")
    return f"{path}{found}{int(index) + first}.{leaf}"

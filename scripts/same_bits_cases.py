"""The fixed runs of scripts/same-bits: what is trained, by whom, and on what.

Whoever changes something here stores the hashes again (`--write`). Every setting that decides a
number is written down, so that a new default is no difference; seeds, texts and model are fixed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[1] / "examples" / "base"
MAX_LENGTH = 48
WORDS = ("the", "red", "small", "boat", "river", "sees", "likes", "old", "house", "bird", "near")

# Splits, ranks, batches, micro-batches, codecs and numbers of rows all differ.
DEVICES: dict[str, dict[str, Any]] = {
    "ada": {"split": 1, "r": 4, "batch_size": 4, "micro_batch": 2, "codec": "float32"},
    "bob": {"split": 3, "r": 8, "batch_size": 6, "micro_batch": 2, "in_flight": 2},
    "cyd": {"split": 6, "r": 2, "batch_size": 3, "codec": "float16"},
    "onno": {"split": 2, "r": 6, "batch_size": 4},
}
ROWS = {"ada": 23, "bob": 41, "cyd": 12, "onno": 17}
TORCH_DEVICES = ("ada", "bob", "cyd")
ONNX_DEVICE = "onno"

PLANNED = {
    "split": "armsc",
    "ranks": "rngwp",
    "rank_set": [2, 4, 8],
    "importance_every": 2,
    "drift": 0.01,
    "min_gain": 0.0,
    "adapter_bytes": 2_000_000,  # not enough for the largest rank everywhere: importance decides
}
FLEET = {
    "devices": {
        "ada": {"board": "orin-nano-8gb", "link": "wifi-good"},
        "bob": {"board": "agx-orin-64gb", "link": "lan-1g"},
        "cyd": {"board": "raspberry-pi-5-8gb", "link": "wifi-poor"},
    },
    "shards": "dirichlet",
    "alpha": 0.5,
    "scale": {"memory": 64, "flops": 1790, "bytes": 24},
    "threads": 1,
    "cache": "cache",
}


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    command: str = "serve"
    """`serve`: a coordinator and its devices; `simulate`: one process, and a modelled clock."""
    devices: tuple[str, ...] = TORCH_DEVICES
    settings: dict[str, Any] = field(default_factory=dict)
    """What the coordinator is told beside the settings of all runs."""

    @property
    def files(self) -> tuple[str, ...]:
        """What is compared, in the order in which a difference shows."""
        modelled = ("clock.jsonl", "plans.jsonl") if self.command == "simulate" else ()
        adapter = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
        return ("metrics.jsonl", *modelled, *adapter)

    @property
    def run_folder(self) -> Path:
        """Where its run folder lies in the folder of all runs."""
        return Path(self.name) / "coordinator" / "runs" / self.name

    def run_settings(self, inputs: Path) -> dict[str, Any]:
        """What `coordinator` reads, without keys and address."""
        settings = {
            "model": str(inputs / "model"),
            "runs": "runs",
            "name": self.name,
            "rounds": 3,
            "steps_per_round": 3,
            "waves": "gathered",
            "min_devices": len(self.devices),
            "max_length": MAX_LENGTH,
            "default": {"split": 2, "batch_size": 4, "codec": "bfloat16"},
            "devices": {name: DEVICES[name] for name in self.devices},
            "server_rank": 8,
            "lora": {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.05},
            "training": TRAINING,
            "evaluation": {"data": {"path": str(inputs / "dev.jsonl")}, "batch_size": 8},
            "device": "cpu",
            "compute": "float32",
            **self.settings,
        }
        if self.command == "simulate":
            data = {"path": str(inputs / "all.jsonl"), "validation_fraction": 0.2}
            settings["simulation"] = {**FLEET, "data": data}
        return settings

    def device_settings(self, name: str, inputs: Path) -> dict[str, Any]:
        """What the device *name* reads, without keys and address."""
        data = {"path": str(inputs / f"{name}.jsonl"), "validation_fraction": 0.2}
        return {
            "data": data,
            "device": "cpu",
            "compute": "float32",
            "backend": "onnxruntime" if name == ONNX_DEVICE else "torch",
            "threads": 1,
            "cache": "cache",
            "state": "state",
        }


TRAINING = {
    "optimizer": "adamw",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 7,
}

CASES = (
    # First, since it takes the longest. An onnxruntime device draws no random numbers.
    Case(
        "exact-device-onnx",
        devices=(*TORCH_DEVICES, ONNX_DEVICE),
        settings={
            "aggregation": "exact",
            "labels": "device",
            "lora": {"r": 8, "lora_alpha": 16.0, "use_rslora": True},
        },
    ),
    Case(
        "exact-device-simulated",
        "simulate",
        settings={
            "aggregation": "exact",
            "labels": "device",
            "devices": {},
            "default": {"split": 2, "batch_size": 4, "codec": "bfloat16"},
            "planning": PLANNED,
        },
    ),
    *(
        Case(
            f"{rule}-{labels}",
            settings={
                "aggregation": rule,
                "labels": labels,
                # Below what a round adds, so that something is cut off.
                "max_rank": 12 if labels == "server" else None,
            },
        )
        for rule in ("exact", "svd", "stack")
        for labels in ("device", "server")
    ),
)


def case_of(name: str) -> Case:
    """The case called *name*."""
    return {case.name: case for case in CASES}[name]


def write_inputs(folder: Path) -> None:
    """Write the model and everybody's texts: the same bytes on every machine."""
    shutil.copytree(MODEL, folder / "model")
    for seed, (name, rows) in enumerate([*ROWS.items(), ("dev", 10), ("all", 60)]):
        lines = (json.dumps(sample(seed, row)) for row in range(rows))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def sample(seed: int, row: int) -> dict[str, str]:
    """A text of its own for every pair of numbers, some long and some short."""
    length = 5 + (7 * row + 3 * seed) % 13
    numbers = [
        (row * row + 5 * seed + place * (row + 2) + place * place) for place in range(length)
    ]
    words = [WORDS[number % len(WORDS)] for number in numbers]
    return {"prompt": " ".join(words[:3]), "completion": " ".join(words[3:])}

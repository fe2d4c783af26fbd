"""Peak memory of training the whole model in one process, with plain PEFT and torch.

The same data, batches, rank and precision as the devices. Prints JSON: peaks, and the floors that
imports alone put under both sides. Started by main.py in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# Of each device the batches that take most memory; more steps would not raise the peak much.
BATCHES_PER_DEVICE = 4


def main() -> None:
    """Measure, or be the process whose imports are measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="of the demo")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--floor", action="store_true", help="of a device; nothing else")
    options = parser.parse_args()
    if options.floor:
        print(json.dumps({"floor": device_floor(options.model, options.task)}))
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--floor"]
    floor = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["floor"]
    whole = whole_model(options.folder, options.model, options.task)
    print(json.dumps({"device_floor": floor, **whole}))


def device_floor(model: Path, task: Any) -> int:
    """Memory of a process that has imported what a device imports, and done nothing."""
    import peft  # noqa: F401
    import torch
    from transformers import AutoTokenizer  # noqa: F401

    import edge_sdk.client.client  # noqa: F401
    import edge_sdk.runtime.torch_runtime  # noqa: F401
    from edge_sdk.model.layout import build_empty
    from edge_sdk.model.weights import load_config
    from profiler.sensors.memory import peak_rss

    build_empty(load_config(model, 0), task, torch.float32)  # imports the model's module
    return int(peak_rss().value or 0)


def whole_model(folder: Path, model_folder: Path, task: Any) -> dict[str, Any]:
    """Train the whole model on the devices' largest batches."""
    import peft
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,  # noqa: F401
    )

    import edge_sdk.data.batches  # noqa: F401
    from coordinator.config.run import ServeConfig
    from coordinator.results.run_folder import CONFIG
    from edge_sdk.client.config import ClientConfig  # noqa: F401
    from edge_sdk.config.loader import load_config
    from edge_sdk.model.layout import build_empty
    from edge_sdk.model.weights import load_config as load_model_config
    from profiler.sensors.memory import peak_rss

    config = load_config(ServeConfig, folder / "runs" / "demo" / CONFIG, env={})
    num_labels = len(config.label_names)
    model_config = load_model_config(model_folder, num_labels)
    build_empty(model_config, task, torch.float32)  # imports the model's module
    floor = int(peak_rss().value or 0)

    torch.set_num_threads(1)
    batches = largest_batches(folder, config)
    factory: Any = AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM
    model = factory.from_pretrained(model_folder, config=model_config, dtype=torch.float32)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS" if num_labels else "CAUSAL_LM",
        r=config.lora.r,
        lora_alpha=int(config.lora.lora_alpha),
        target_modules="all-linear",
    )
    model = peft.get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for micro in batches:
        ids, lengths = torch.from_numpy(micro.input_ids), torch.from_numpy(micro.lengths)
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        labels = torch.from_numpy(micro.labels)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"floor": floor, "peak": int(peak_rss().value or 0), "steps": len(batches)}


def largest_batches(folder: Path, config: Any) -> list[Any]:
    """Of every device the batches with the most tokens, padding included, smallest first."""
    from transformers import AutoTokenizer

    from edge_sdk.client.config import ClientConfig
    from edge_sdk.config.loader import load_config
    from edge_sdk.data.batches import Batches
    from edge_sdk.data.rows import load_data
    from edge_sdk.data.tokenize import ModelLimits, tokenize_rows
    from edge_sdk.model.weights import load_config as load_model_config

    text_config = load_model_config(Path(config.model), 0).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    limits = ModelLimits(
        vocab_size=text_config.vocab_size,
        max_positions=config.max_length or text_config.max_position_embeddings,
        num_labels=len(config.label_names) or None,
    )
    chosen = []
    for name in config.devices:
        device = load_config(ClientConfig, folder / name / "device.yaml", env={})
        rows, _ = load_data(None, device.data, config.training.seed)
        examples = tokenize_rows(rows, tokenizer, device.data, limits)
        size = config.settings(name).batch_size
        stream = Batches(
            examples, size, size, config.training.seed, name, pad_id=text_config.pad_token_id or 0
        )
        micros = [stream.at(step).micro_batches[0] for step in range(config.total_steps)]
        chosen += sorted(micros, key=lambda micro: micro.input_ids.size)[-BATCHES_PER_DEVICE:]
    return sorted(chosen, key=lambda micro: micro.input_ids.size)


if __name__ == "__main__":
    main()

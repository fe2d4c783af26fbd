"""Examples with which the help of each command of `coordinator` ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EXAMPLES: Mapping[str, Sequence[str]] = {
    "init": ["init", "init lab/run.yaml --model Qwen/Qwen3-0.6B"],
    "serve": [
        "serve --config run.yaml",
        "serve --config run.yaml --preset hsplitlora",
        "serve --config run.yaml --check",
        "serve --config run.yaml --resume",
        "serve model=examples/base rounds=4 devices.kitchen.split=3 min_devices=2",
    ],
    "resume": ["resume runs/first", "resume runs/first rounds=20"],
    "check": [
        "check --config run.yaml",
        "check --config run.yaml --profiles kitchen.json garage.json rounds=20",
        "check --model Qwen/Qwen3-0.6B",
        "check --model path/to/classifier --task sequence-classification",
    ],
    "plan": [
        "plan --config run.yaml --profiles kitchen.json garage.json --explain",
        "plan --preset hsplitlora --profiles kitchen.json model=examples/base",
    ],
    "lr-find": [
        "lr-find --config run.yaml",
        "lr-find --config run.yaml --data texts.jsonl --steps 200 --plot rates.png",
    ],
    "simulate": [
        "simulate --config examples/simulate.yaml",
        "simulate --config examples/simulate.yaml --preset hetlora rounds=2",
    ],
    "compare": [
        "compare --config examples/compare.yaml --out comparison",
        "compare --config examples/compare.yaml --presets hsplitlora splitlora rounds=2",
        "compare examples/papers/splitlora-gpt2-s.yaml --scale tiny",
    ],
    "audit-privacy": [
        "audit-privacy --model examples/base --data texts.jsonl",
        "audit-privacy --run runs/first --data texts.jsonl --codecs int8 --splits 1 2 --out audit",
    ],
    "experiment run": [
        "experiment run examples/experiment.yaml",
        "experiment run examples/experiment.yaml --out boards rounds=2",
    ],
    "status": ["status runs/first", "status runs/first --format json"],
    "deploy": [
        "deploy boards.yaml --check",
        "deploy boards.yaml",
        "deploy boards.yaml --status --only kitchen garage",
        "deploy boards.yaml --remove --only kitchen",
    ],
    "health": ["health runs/first", "health --config run.yaml --live --within 120"],
    "pause": ["pause runs/first", "pause runs/first --after-round"],
    "generate": [
        'generate runs/first --prompt "Once upon a time"',
        'generate runs/first --prompt "What is LoRA?" --form chat --temperature 0.7 --seed 1',
        "generate runs/first --round 0 --format json",
    ],
    "score": [
        "score runs/first --scores bleu nist",
        "score runs/first --data test.csv --texts written.jsonl evaluation.generate.num_beams=10",
        "score runs/first --round 0 --format json",
    ],
    "stop": ["stop runs/first", "stop runs/first --after-round"],
    "page": [
        "page runs/first",
        "page runs --listen 127.0.0.1:8080",
        "page runs/first --listen 0.0.0.0:7071 --token-file page.token",
    ],
    "report": ["report runs/first", "report runs/first --out first.html"],
    "export": [
        "export runs/first --to my-adapter",
        "export runs/first --to for-vllm --format vllm",
        "export runs/first --to my-model --merged --dtype bfloat16",
    ],
    "presets list": ["presets list"],
    "presets show": ["presets show hsplitlora"],
    "keygen": ["keygen", "keygen keys/coordinator.key"],
    "enrol": [
        "enrol kitchen --config run.yaml",
        "enrol kitchen --address tcp://192.168.1.10:7070 --minutes 60",
        "enrol kitchen --config run.yaml --replace",
        "enrol kitchen --withdraw",
    ],
    "client register": [
        "client register kitchen device.key.pub",
        "client register kitchen device.key.pub --allow-list lab/devices.yaml",
    ],
    "client unregister": ["client unregister kitchen"],
    "client pending": ["client pending", "client pending --allow-list lab/devices.yaml"],
    "client approve": ["client approve kitchen 43b7:46bf:a823:a2ed"],
    "client list": ["client list", "client list --format json"],
}
"""By the words of a command; the program's name is left out."""

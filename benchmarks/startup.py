"""What starting costs: seconds and CPU seconds from the command to listening and to a first step.

    python benchmarks/startup.py [--repeats 3] [--older CHECKOUT] [--gib 2]

Our base model on E2E, the real commands as processes of their own, one round of one step, watched
from outside: the lines that they print, and the CPU time that the kernel has counted by then. The
caches are warm, as at every start but the first. Then a Llama's shape of --gib GiB of random
bfloat16: the time until a coordinator that serves it listens. With --older a clone at an older
commit is measured in turn with this one. CPU time is the fairer number where others work too.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from report import header, save, table

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "base"
SHARED = ROOT.parent / "shared" / "data"
BACKENDS = ("torch", "onnxruntime")
SHARDS, BATCH, RANK = 3, 16, 8
TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE_S = 300.0
# Lines by which a process says how far it is.
COORDINATOR = {"listening": "listening at", "first step": "d0: step 1/"}
DEVICE = {"joined": "taking part", "plan": "plan: ", "first step": ": step 1,"}
# What plain PEFT does before and in its first step, on the same data.
PLAIN = """
import json, sys, torch, peft
from transformers import AutoModelForCausalLM, AutoTokenizer
model, shards = sys.argv[1], sys.argv[2:]
tokenizer = AutoTokenizer.from_pretrained(model)
network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
network = peft.get_peft_model(network, config).train()
samples = []
for shard in shards:
    rows = [json.loads(line) for line in open(shard, encoding="utf-8")]
    asked = tokenizer([row["prompt"] + chr(10) for row in rows])["input_ids"]
    told = tokenizer([row["completion"] for row in rows])["input_ids"]
    samples += [(a, b) for a, b in zip(asked, told)]
optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
some = samples[:48]
longest = max(len(a) + len(b) for a, b in some)
ids = torch.tensor([a + b + [0] * (longest - len(a) - len(b)) for a, b in some])
labels = [[-100] * len(a) + b + [-100] * (longest - len(a) - len(b)) for a, b in some]
mask = torch.tensor([[1] * (len(a) + len(b)) + [0] * (longest - len(a) - len(b)) for a, b in some])
network(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels)).loss.backward()
optimizer.step()
"""
Seen = dict[str, tuple[float, float]]
"""Seconds since the start and CPU seconds, by mark."""


class Watched:
    """A process whose lines are looked at while it runs."""

    def __init__(self, command: list[str], checkout: Path, marks: dict[str, str]) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self._began, self._marks = time.monotonic(), dict(marks)
        self.seen: Seen = {}
        self._news: queue.Queue[str] = queue.Queue()
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            for mark, words in list(self._marks.items()):
                if words in line:
                    del self._marks[mark]
                    self.seen[mark] = (time.monotonic() - self._began, self._cpu_s())
                    self._news.put(mark)
        self._news.put("")

    def _cpu_s(self) -> float:
        """CPU seconds of the process and of the children that it has waited for."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICKS

    def wait_for(self, mark: str) -> None:
        """Wait until it has said that it is so far."""
        while mark not in self.seen:
            if self._news.get(timeout=PATIENCE_S) == "" and mark not in self.seen:
                raise SystemExit(f"it ended before {mark!r}: {''.join(self._lines)}")

    def end(self) -> Seen:
        """Wait for its end; what it has used until then is `whole`."""
        self._reader.join()
        _, status, usage = os.wait4(self._process.pid, 0)
        whole = time.monotonic() - self._began
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            raise SystemExit(f"ended with {self._process.returncode}: {''.join(self._lines)}")
        self.seen["whole"] = (whole, usage.ru_utime + usage.ru_stime)
        return self.seen

    def kill(self) -> None:
        """End it in the middle."""
        self._process.kill()
        self._process.wait()


def command(module: str, *words: str) -> list[str]:
    """Return how a console script of ours is started, whichever checkout it is of."""
    script = f"import sys; from {module} import main; sys.exit(main())"
    return [sys.executable, "-c", script, *words]


def shell(module: str, *words: str) -> None:
    """Run a command of ours to its end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command(module, *words), check=True, stdout=subprocess.DEVNULL, env=env)


def write_shards(folder: Path, shared: Path) -> list[Path]:
    """Write consecutive thirds of E2E."""
    with (shared / "e2e" / "trainset.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    third, paths = len(rows) // SHARDS, []
    for index in range(SHARDS):
        paths.append(folder / f"shard-{index}.jsonl")
        with paths[-1].open("w", encoding="utf-8") as file:
            for row in rows[index * third : (index + 1) * third]:
                file.write(json.dumps({"prompt": row["mr"], "completion": row["ref"]}) + "\n")
    return paths


def write_keys(folder: Path) -> None:
    """Make and register the keys of a coordinator and its devices."""
    shell("coordinator.cli", "keygen", str(folder / "coordinator.key"))
    for index in range(SHARDS):
        key = folder / f"d{index}.key"
        shell("edge_sdk.cli", "keygen", str(key))
        flags = ["--allow-list", str(folder / "devices.yaml")]
        shell("coordinator.cli", "client", "register", f"d{index}", f"{key}.pub", *flags)


def write_configs(folder: Path, options: argparse.Namespace, devices: int, backend: str) -> None:
    """Write what coordinator and devices read."""
    run = {
        "model": str(MODEL),
        "listen": f"tcp://127.0.0.1:{options.port}",
        "secret_key": str(folder / "coordinator.key"),
        "allow_list": str(folder / "devices.yaml"),
        "runs": str(folder / "runs"),
        "labels": "server",
        "rounds": 1,
        "steps_per_round": 1,
        "min_devices": devices,
        "default": {"batch_size": BATCH, "split": 3},
        "lora": {"r": RANK},
        "evaluation": {"on_devices": False},
    }
    (folder / "run.json").write_text(json.dumps(run))
    for index in range(devices):
        device = {
            "coordinator": run["listen"],
            "server_key": str(folder / "coordinator.key.pub"),
            "secret_key": str(folder / f"d{index}.key"),
            "data": {"path": str(folder / f"shard-{index}.jsonl")},
            "state": str(folder / f"state-{index}"),
            "cache": str(folder / "cache" / "parts"),
            "backend": backend,
            "threads": 1,
        }
        (folder / f"d{index}.json").write_text(json.dumps(device))


def start(checkout: Path, folder: Path, devices: int) -> dict[str, Seen]:
    """One run of one step; returns what each process was seen to do."""
    serve = command("coordinator.cli", "serve", "--config", str(folder / "run.json"))
    server = Watched(serve, checkout, COORDINATOR)
    server.wait_for("listening")
    own = [
        Watched(
            command("edge_sdk.cli", "run", "--config", str(folder / f"d{i}.json")), checkout, DEVICE
        )
        for i in range(devices)
    ]
    found = {f"device {i}": device.end() for i, device in enumerate(own)}
    for index in range(devices):
        shutil.rmtree(folder / f"state-{index}")
    return {"coordinator": server.end(), **found}


def large(checkout: Path, folder: Path, options: argparse.Namespace) -> Seen:
    """A coordinator that serves a large model, until it listens."""
    config = json.loads((folder / "run.json").read_text()) | {"model": str(folder / "large")}
    (folder / "large.json").write_text(json.dumps(config))
    serve = command("coordinator.cli", "serve", "--config", str(folder / "large.json"))
    server = Watched(serve, checkout, {"listening": COORDINATOR["listening"]})
    server.wait_for("listening")
    server.kill()
    return server.seen


def make_large(folder: Path, gib: float) -> None:
    """Write a Llama's shape of random bfloat16 in about 1 GiB a file, with our tokenizer."""
    import torch
    from safetensors.torch import save_file

    width, inner = 2048, 5632
    block = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width // 4, width),
        "self_attn.v_proj": (width // 4, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    size = 2 * sum(a * b for a, b in block.values())
    config: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
    config |= {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "head_dim": 64,
        "num_hidden_layers": max(4, round(gib * 2**30 / size)),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    places: dict[str, str] = {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name)
        places.update(dict.fromkeys(tensors, name))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02)

    ones = torch.ones(width, dtype=torch.bfloat16)
    write(0, {"model.embed_tokens.weight": drawn(4096, width), "model.norm.weight": ones})
    per_file = max(1, 2**30 // size)
    for first in range(0, config["num_hidden_layers"], per_file):
        tensors = {}
        for index in range(first, min(first + per_file, config["num_hidden_layers"])):
            path = f"model.layers.{index}"
            tensors |= {f"{path}.{n}.weight": drawn(*shape) for n, shape in block.items()}
            tensors |= {
                f"{path}.{n}.weight": ones.clone()
                for n in ("input_layernorm", "post_attention_layernorm")
            }
        write(1 + first, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


Times = dict[tuple[str, str], dict[str, list[tuple[float, float]]]]
"""What was seen, by process and mark, on each side."""


def measure(options: argparse.Namespace, sides: dict[str, Path], times: Times) -> None:
    """Run every start on each side, in turn; the first turn fills caches and is not counted."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        shards = write_shards(folder, options.shared)
        write_keys(folder)
        if options.gib:
            make_large(folder / "large", options.gib)

        def note(turn: int, side: str, process: str, seen: Seen) -> None:
            for mark, pair in seen.items():
                print(turn, side, process, mark, *(f"{n:.2f}" for n in pair), file=sys.stderr)
                if turn:
                    times[process, mark][side].append(pair)

        for turn in range(options.repeats + 1):
            for side, checkout in sides.items():
                for backend in BACKENDS:
                    write_configs(folder, options, 1, backend)
                    for process, seen in start(checkout, folder, 1).items():
                        note(turn, side, f"{process}, {backend}", seen)
                write_configs(folder, options, SHARDS, "torch")
                every = start(checkout, folder, SHARDS).values()
                sums = tuple(sum(seen["whole"][i] for seen in every) for i in (0, 1))
                note(turn, side, f"coordinator and {SHARDS} devices together", {"whole": sums})
                if options.gib:
                    seen = large(checkout, folder, options)
                    note(turn, side, f"coordinator, {options.gib:g} GiB", seen)
            words = [sys.executable, "-c", PLAIN, str(MODEL), *map(str, shards)]
            note(turn, "now", "plain PEFT", Watched(words, ROOT, {}).end())


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--older", type=Path, help="a clone at an older commit")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the large model; 0: none")
    parser.add_argument("--port", type=int, default=17390)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with the data sets")
    options = parser.parse_args()
    sides = {} if options.older is None else {"before": options.older.resolve()}
    sides["now"] = ROOT
    times: Times = defaultdict(lambda: defaultdict(list))
    measure(options, sides, times)
    rows = []
    for (process, mark), found in times.items():
        cells = []
        for place in (0, 1):
            for side in sides:
                seen = sorted(pair[place] for pair in found.get(side, ()))
                middle = f"{statistics.median(seen):.2f} ({seen[0]:.2f}-{seen[-1]:.2f})"
                cells.append(middle if seen else "")
        rows.append((process, mark, *cells))
    heads = [f"{what}, {side}" for what in ("s", "CPU s") for side in sides]
    text = (
        f"Median of {options.repeats} starts (lowest-highest), each side in turn, caches warm, one "
        "thread a process. `whole` is a run of one step from start to end, its export included; "
        "for several processes it is their sum. Plain PEFT has the same model, adapters and data, "
        f"and makes one step of {SHARDS * BATCH} sequences."
    )
    report = "\n\n".join(
        [header("Starting", options), text, table(("process", "until", *heads), rows)]
    )
    save("startup", report)


if __name__ == "__main__":
    main()

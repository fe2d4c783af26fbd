"""Compare short seeded runs of this checkout with stored hashes or an older one, byte by byte.

What the runs are is in same_bits_cases.py, how a checkout runs them in same_bits_run.py.

Compared: metrics.jsonl, and of the adapter its weights and its config; of the simulated run the
modelled clock.jsonl and plans.jsonl as well. Not compared: telemetry.jsonl and events.jsonl, which
hold times and bytes of memory, the adapter's README, checkpoints, and what is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from same_bits_cases import CASES, case_of, write_inputs

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "scripts" / "same_bits.json"
SAME, DIFFERENT, UNKNOWN, INTERRUPTED = 0, 1, 2, 130

# Fields that say where or when something was written, and the files that hold them. Nothing of
# metrics.jsonl: it holds only what the seed decides.
NOT_COMPARED = {
    "adapter_config.json": ("base_model_name_or_path",),  # the folder of the model on this machine
}
# Lists that PEFT writes in the order of a set.
UNORDERED = ("target_modules", "modules_to_save")

# Their versions decide the last bits.
PACKAGES = ("numpy", "onnxruntime", "peft", "tokenizers", "torch", "transformers")
OURS = ("EDGE_SDK_", "COORDINATOR_")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
# One set of kernels for all x86 processors: otherwise each library takes the best that it finds.
X86_KERNELS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
# onnxruntime alone cannot be told, so the class of the processor is part of the platform.
CLASSES = ("avx512f", "avx2", "sve", "asimd")

Files = Mapping[str, bytes]
"""What is compared, by case and file: `svd-server/metrics.jsonl`."""


class Unknown(Exception):
    """Nothing can be said; the message says why."""


def main() -> int:
    options = options_from(sys.argv[1:])
    names = [case.name for case in CASES if not options.only or case.name in options.only]
    began_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="same-bits-") as folder:
            code = act(options, names, Path(folder))
    except Unknown as error:
        print(f"same-bits: {error}", file=sys.stderr)
        return UNKNOWN
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"same-bits: {len(names)} runs, {time.monotonic() - began_s:.0f} s")
    return code


def options_from(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/same-bits",
        description="Prove that a change of the code changes nothing that is learned, to the bit.",
        epilog="Exit codes: 0 the same, 1 different, 2 cannot tell.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--against", metavar="FOLDER_OR_REVISION", help="run an older checkout beside this one"
    )
    what.add_argument("--write", action="store_true", help="store the hashes of this platform")
    names = [case.name for case in CASES]
    parser.add_argument("--only", action="append", choices=names, help="this case; repeatable")
    return parser.parse_args(arguments)


def act(options: argparse.Namespace, names: Sequence[str], folder: Path) -> int:
    """Do what was asked for, with files in *folder*; returns the exit code."""
    stored = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    if options.against is not None:
        older = checkout_of(options.against, folder / "older")
        found, expected = results({"new": ROOT, "old": older}, names, folder)
        return told([line for key in found if (line := difference(key, expected, found))])
    if options.write:
        (found,) = results({"new": ROOT}, names, folder)
        entry = stored.setdefault(platform_name(), {"packages": {}, "sha256": {}})
        if options.only and entry["packages"] not in ({}, packages()):
            raise Unknown("other packages than those of the stored hashes; store all of them")
        entry["packages"] = packages()
        entry["sha256"] = dict(sorted((entry["sha256"] | hashes(found)).items()))
        STORED.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        print(f"same-bits: hashes of {platform_name()} stored in {STORED.name}")
        return SAME
    entry = stored.get(platform_name())
    if entry is None:
        raise Unknown(f"no hashes of {platform_name()} are stored; use --against REVISION")
    (found,) = results({"new": ROOT}, names, folder)
    return compared(hashes(found), entry)


def compared(found: Mapping[str, str], entry: Mapping[str, Any]) -> int:
    """Say how *found* compares with the stored hashes; returns the exit code."""
    expected = entry["sha256"]
    lines = [
        f"{key} is {'not what is stored' if key in expected else 'not stored'}"
        for key, value in found.items()
        if expected.get(key) != value
    ]
    odd = [f"{n} {v}" for n, v in packages().items() if entry["packages"].get(n) != v]
    if lines and odd:
        raise Unknown(
            f"{lines[0]}, but the hashes were stored with other versions than {', '.join(odd)}; "
            "use --against REVISION"
        )
    return told(lines)


def told(differences: Sequence[str]) -> int:
    """Print the differences, and return the exit code."""
    for line in differences:
        print(f"different: {line}")
    print(f"same-bits: {'DIFFERENT' if differences else 'the same, to the bit'}")
    return DIFFERENT if differences else SAME


def checkout_of(what: str, folder: Path) -> Path:
    """The checkout that --against names, where it is a revision written to *folder*."""
    path = Path(what).resolve()
    if path.is_dir():
        if not (path / "coordinator" / "cli.py").is_file():
            raise Unknown(f"{what} is a folder, but no checkout of EdgeSplit")
        return path
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", what]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        raise Unknown(f"{what} is neither a folder nor a revision: {archive.stderr.decode()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def results(checkouts: Mapping[str, Path], names: Sequence[str], folder: Path) -> list[Files]:
    """Run the cases with each of *checkouts*, at the same time; returns what they wrote."""
    (folder / "inputs").mkdir()
    write_inputs(folder / "inputs")
    running = {}
    script = Path(__file__).with_name("same_bits_run.py")
    try:
        for name, checkout in checkouts.items():
            home = folder / name
            home.mkdir()
            command = [sys.executable, script, checkout, folder / "inputs", *names]
            running[name] = subprocess.Popen(command, cwd=home, env=environment(checkout, home))
        for name, process in running.items():
            if process.wait():
                raise Unknown(f"the runs of {checkouts[name]} failed")
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return [collected(folder / name, names) for name in checkouts]


def environment(checkout: Path, home: Path) -> dict[str, str]:
    """Our environment without settings of somebody's own runs, and for the code of *checkout*."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    env |= {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(home / "cache")}
    env |= {
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    return env | ONE_THREAD | (X86_KERNELS if platform.machine() == "x86_64" else {})


def collected(folder: Path, names: Sequence[str]) -> Files:
    """What is compared, of the runs in *folder*."""
    found = {}
    for case in map(case_of, names):
        for file in case.files:
            path = folder / case.run_folder / file
            if not path.is_file():
                raise Unknown(f"{case.name}: the run wrote no {file}")
            found[f"{case.name}/{file}"] = comparable(path.name, path.read_bytes())
    return found


def comparable(name: str, data: bytes) -> bytes:
    """The part of the file *name* that is compared: its bytes, where no field is left out."""
    if name not in NOT_COMPARED:
        return data
    values = json.loads(data)
    for field in NOT_COMPARED[name]:
        del values[field]
    for field in UNORDERED:
        values[field] = sorted(values[field]) if values[field] else values[field]
    return json.dumps(values, sort_keys=True).encode()


def hashes(files: Files) -> dict[str, str]:
    """SHA-256 of everything that is compared."""
    return {key: hashlib.sha256(data).hexdigest() for key, data in files.items()}


def difference(key: str, old: Files, new: Files) -> str | None:
    """Where the file *key* first differs, in words; None where it does not."""
    if old[key] == new[key]:
        return None
    before, after = fields(key, old[key]), fields(key, new[key])
    for name in before | after:
        if before.get(name) != after.get(name):
            return f"{key}: {name}: {before.get(name)} became {after.get(name)}"
    return f"{key}: the values are the same, but not the bytes"


def fields(key: str, data: bytes) -> dict[str, Any]:
    """The values of a file by name: `line 2, eval.loss`, or the name of a tensor."""
    if key.endswith(".safetensors"):
        return tensors(data)
    if key.endswith(".jsonl"):
        lines = enumerate(data.decode().splitlines(), start=1)
        return {f"line {i}, {n}": v for i, text in lines for n, v in leaves(json.loads(text))}
    return dict(leaves(json.loads(data)))


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every single value below *value*, with the names that lead to it."""
    if not isinstance(value, dict | list) or not value:
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for n, v in items for leaf in leaves(v, f"{path}.{n}" if path else str(n))]


def tensors(data: bytes) -> dict[str, str]:
    """Shape and hash of each tensor of a safetensors file."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    found = {}
    for name, facts in header.items():
        if name == "__metadata__":
            found[name] = str(facts)
            continue
        begin, end = facts["data_offsets"]
        digest = hashlib.sha256(data[start + begin : start + end]).hexdigest()
        found[name] = f"{facts['dtype']} {facts['shape']} {digest[:12]}"
    return found


def packages() -> dict[str, str]:
    """Versions of the packages that compute."""
    return {name: metadata.version(name) for name in PACKAGES}


def platform_name() -> str:
    """What stored hashes are kept by: `x86_64-avx512f-torch2.13.0`."""
    text = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    flags = set(text.split())
    kind = next((name for name in CLASSES if name in flags), "plain")
    torch = metadata.version("torch").split("+")[0]
    return f"{platform.machine()}-{kind}-torch{torch}"


if __name__ == "__main__":
    sys.exit(main())

"""What `edge-sdk doctor` lets a process of its own try: real kernels, which may kill it.

    python -m edge_sdk.doctor.kernels DEVICE STAGE ...

Writes a line of JSON before and after each stage, so that whoever reads them knows which one did
not come back. Not here: what that means (`compute.py`).

Legend: B rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from edge_sdk.errors import one_line

ROWS, SIZE, RANK = 64, 256, 8
SCALE = 2.0
REPEATS = 3
# One MatMul of `hidden` with itself, named as a tail is: ONNX IR 8, opset 17, 4 x 4 float32.
ONNX_MATMUL = bytes.fromhex(
    "08083a530a1d0a0668696464656e0a0668696464656e12036f757422064d61744d756c1201745a18"
    "0a0668696464656e120e0a0c080112080a0208040a02080462150a036f7574120e0a0c080112080a"
    "0208040a02080442040a001011"
)


def main(arguments: list[str]) -> None:
    """Try every stage in order and say what came of it."""
    device, *stages = arguments
    for stage in stages:
        _say({"begin": stage})
        try:
            found: dict[str, Any] = {"found": STAGES[stage](device)}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
            found = {"error": f"{type(error).__name__}: {one_line(error)}"}
        _say({"end": stage, **found})


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()  # the next instruction may be the last


def _torch(device: str) -> dict[str, Any]:
    """Load torch; returns what it was built for and what it sees."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "is_available": is_available,
        "device": _place(device),
        "notes": [one_line(one.message) for one in caught if isinstance(one.message, Warning)],
    }
    if is_available:
        found["gpu"] = torch.cuda.get_device_name(0)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
        found["built_for"] = torch.cuda.get_arch_list()
    return found


def _place(device: str) -> str:
    """Return where a run would compute; `auto` is CUDA where there is one."""
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _product(dtype: str) -> Callable[[str], dict[str, Any]]:
    """Return the stage that runs a weight with an adapter in *dtype*, forward and backward."""

    def stage(device: str) -> dict[str, Any]:
        import torch

        from edge_sdk.model.precision import autocast

        where, kind = torch.device(_place(device)), getattr(torch, dtype)
        draw = np.random.default_rng(0)
        x_BI, w_OI = draw.normal(size=(ROWS, SIZE)), draw.normal(size=(SIZE, SIZE)) / SIZE**0.5
        a_RI, b_OR = draw.normal(size=(RANK, SIZE)) / SIZE**0.5, draw.normal(size=(SIZE, RANK))
        x, w, a, b = (
            torch.tensor(one, dtype=torch.float32, device=where) for one in (x_BI, w_OI, a_RI, b_OR)
        )
        a.requires_grad_(True)
        b.requires_grad_(True)
        times: list[float] = []
        grads: list[np.ndarray] = []
        for _ in range(REPEATS):
            a.grad = b.grad = None
            began = time.perf_counter()
            with autocast(kind, where):
                y = x @ w.T + SCALE * (x @ a.T) @ b.T
            torch.autograd.backward(0.5 * y.float().pow(2).mean())
            assert a.grad is not None
            assert b.grad is not None
            grads = [one.double().cpu().numpy() for one in (a.grad, b.grad)]
            times.append(time.perf_counter() - began)
        exact = _gradients(x_BI, w_OI, a_RI, b_OR)
        return {
            "error": max(_distance(*pair) for pair in zip(grads, exact, strict=True)),
            "seconds": min(times),
        }

    return stage


def _gradients(
    x_BI: np.ndarray, w_OI: np.ndarray, a_RI: np.ndarray, b_OR: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return dL/dA and dL/dB of L = mean(y^2) / 2 in float64, worked out by hand."""
    hidden_BR = x_BI @ a_RI.T
    g_BO = (x_BI @ w_OI.T + SCALE * hidden_BR @ b_OR.T) / (len(x_BI) * len(w_OI))
    return SCALE * (g_BO @ b_OR).T @ x_BI, SCALE * g_BO.T @ hidden_BR


def _distance(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _packed(kind: Any) -> Callable[[str], dict[str, Any]]:
    """Return the stage that runs a frozen layer in our own *kind*, forward and backward."""

    def stage(device: str) -> dict[str, Any]:
        import torch

        from edge_sdk.model.quantized import quantize_linears, take_weight

        where = torch.device(_place(device))
        torch.manual_seed(0)
        linear = torch.nn.Linear(SIZE, SIZE, bias=False)
        weight, layers = linear.weight.detach().clone(), torch.nn.Sequential(linear)
        quantize_linears(layers, kind)
        take_weight(layers[0], weight, where)
        x = torch.randn(ROWS, SIZE, device=where, requires_grad=True)
        y = layers(x)
        torch.autograd.backward(y.sum())
        assert x.grad is not None
        exact = x.detach().cpu() @ weight.T
        return {
            "error": max(
                float((y.detach().cpu() - exact).norm() / exact.norm()),
                float((x.grad.cpu() - weight.sum(0)).norm() / (ROWS**0.5 * weight.sum(0).norm())),
            )
        }

    return stage


def _bitsandbytes(device: str) -> dict[str, Any]:
    """Quantise to four bits and back; loading it proves nothing on a board."""
    import torch

    bnb: Any = importlib.import_module("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(SIZE, SIZE, device=_place(device))
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    back = bnb.dequantize_4bit(packed, state).float()
    return {"error": float((back - weight).norm() / weight.norm())}


def _torchao(device: str) -> dict[str, Any]:
    """Run a layer whose weight is held in eight bits."""
    import torch

    torchao: Any = importlib.import_module("torchao.quantization")
    torch.manual_seed(0)
    where = _place(device)
    layer = torch.nn.Sequential(torch.nn.Linear(SIZE, SIZE, bias=False, device=where))
    x = torch.randn(ROWS, SIZE, device=where)
    with torch.no_grad():
        exact = layer(x)
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
        return {"error": float((layer(x) - exact).norm() / exact.norm())}


def _onnxruntime(_device: str) -> dict[str, Any]:
    """Run a matrix product as the backend without torch runs its graphs."""
    from edge_sdk.runtime.onnx_graphs import About, Graphs
    from edge_sdk.runtime.onnx_session import OnnxModel, version

    about = About(blocks_path="", kinds=(), task="causal-lm", head=())
    model = OnnxModel(Graphs(about, {"tail": ONNX_MATMUL}), {}, threads=1)
    hidden = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    nothing = np.zeros(0, np.int32)
    found = model.tail(hidden, nothing, nothing, ["out"])["out"].numpy()
    exact = hidden.astype(np.float64) @ hidden.astype(np.float64)
    return {"version": version(), "error": _distance(found, exact)}


STAGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "torch": _torch,
    "float32": _product("float32"),
    "bfloat16": _product("bfloat16"),
    "float16": _product("float16"),
    "int8": _packed("int8"),
    "int4": _packed("int4"),
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "onnxruntime": _onnxruntime,
}

if __name__ == "__main__":
    main(sys.argv[1:])

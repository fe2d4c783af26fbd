"""The configuration of a device: what `edge-sdk run --config device.yaml` reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edge_sdk.accept import Accept
from edge_sdk.client.backends import BACKENDS
from edge_sdk.data.rows import DataConfig
from edge_sdk.model.precision import BaseSetting, Compute
from edge_sdk.protocol.packets import MAX_CHUNK_BYTES
from edge_sdk.transport.addresses import check_dialled
from profiler.profile import DeviceProfile

if TYPE_CHECKING:
    BackendName = str
else:  # the backends themselves are the choices
    BackendName = Literal[("auto", *BACKENDS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Everything that a device decides for itself; the rest comes from the coordinator."""

    coordinator: str
    """Address of the coordinator, e.g. tcp://192.168.1.10:7070."""
    server_key: str
    """The coordinator's public key, or the file that holds it."""
    secret_key: Path = Path("device.key")
    """This device's secret key, made by `edge-sdk keygen`; its public half is registered."""
    data: DataConfig = field(default_factory=DataConfig)
    """The private data; left empty when a data set is handed to `EdgeClient`."""
    model: str | None = None
    """Folder or Hugging Face id of the same model, so that nothing is downloaded from the
    coordinator; each part must have the coordinator's hash."""
    accept: Accept = field(default_factory=Accept)
    """What a coordinator may ask of this device; everything else is refused here."""
    model_hash: str = ""
    """`accept.model_hash`, by its old name."""
    device: str = "auto"
    """Where the device computes: `auto`, `cpu`, `cuda`."""
    backend: BackendName = "auto"
    """What computes: `torch`, or `onnxruntime`, which is small and needs no torch; auto is torch
    where it is installed. `onnxruntime-training` is onnxruntime with gradients of its own making
    (docs/onnx.md)."""
    compute: Compute = "auto"
    """Dtype of matrix products; auto is bfloat16 where the hardware itself has it. Where numbers do
    not fit into float16, products go on in bfloat16, and the log names the block."""
    base: BaseSetting = "float32"
    """How the frozen weights lie in memory. With int8 and int4 the linear layers of the blocks are
    quantized, without a compiled extension; the rest is float32. auto is float32 where that fits
    into the memory that the run may use, else int8; the device says which, and why. See
    docs/quantized.md."""
    recompute: bool = False
    """Whether the backward pass computes the blocks a second time: while the device waits for its
    gradient it holds almost nothing, and a step takes longer by one forward pass. onnxruntime
    always does so, a block at a time."""
    threads: int | None = None
    """CPU threads of the backend; None leaves the choice to it."""
    cache: Path | None = None
    """Downloaded parts of models; None: edgesplit/parts in the user's cache folder."""
    profile: DeviceProfile = field(default_factory=DeviceProfile)
    """What the run may use of this device, set by hand; what is left out is measured when the
    coordinator asks. `memory_bytes` is the budget of the whole process."""
    state: Path = Path("edge-state")
    """Checkpoints of this device's adapters and optimizer, a folder for each run."""
    keep_held: bool = False
    """Whether hidden states that are held for the codec `residual` are also written to `state`, at
    the start of each round, so that a device that restarts need not send whole ones again."""
    patience_s: float = 600.0
    """Seconds that an unreachable coordinator is retried before giving up."""
    chunk_bytes: int = 1024 * 1024
    """Payload of one packet in bytes; 262144 on links below 4 Mbit/s."""

    def __post_init__(self) -> None:
        check_dialled("coordinator", self.coordinator)
        if self.model_hash and self.accept.model_hash not in ("", self.model_hash):
            raise ValueError("model_hash and accept.model_hash differ; leave out model_hash")
        if self.model_hash:
            accept = replace(self.accept, model_hash=self.model_hash)
            object.__setattr__(self, "accept", accept)
        if self.backend not in ("auto", *BACKENDS):
            names = ", ".join(("auto", *BACKENDS))
            raise ValueError(f"backend must be one of {names}, got {self.backend!r}")
        if self.patience_s <= 0:
            raise ValueError(f"patience_s must be above 0, got {self.patience_s}")
        if not 0 < self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes must be 1..{MAX_CHUNK_BYTES}, got {self.chunk_bytes}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")

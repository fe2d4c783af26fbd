"""`edge-sdk doctor`: what breaks on real boards, looked at before a run does.

Decides which checks there are and in which order; each stands in a file beside this one.
Takes part in no run.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.client.backends import ONNXRUNTIME, TORCH, choose_backend
from edge_sdk.client.config import ClientConfig
from edge_sdk.doctor import compute, machine, packages
from edge_sdk.doctor import config as written
from edge_sdk.doctor import link as links
from edge_sdk.doctor.finding import Finding, failure, ok, skipped
from edge_sdk.errors import ConfigError, EdgeError, one_line
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.transport.handshake import shake_hands
from edge_sdk.transport.keys import load_key_pair, load_public_key
from edge_sdk.transport.link import LinkConfig
from profiler.sensors.sources import HERE, Sources

FAILURE_EXIT_CODE = 1
NAME_WIDTH = 14
KERNEL_STAGES = ("torch", "float32", "bfloat16", "float16", *compute.OURS_TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the doctor is asked to look at."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    env: Mapping[str, str]
    env_prefix: str
    session: bool = False
    """Also open a session with the coordinator, which gives a key one at a time."""

    @property
    def has_config(self) -> bool:
        """Whether there is anything to look at beyond the machine."""
        is_set = any(name.startswith(self.env_prefix) for name in self.env)
        return self.config is not None or bool(self.overrides) or is_set


def exit_code(findings: Iterable[Finding]) -> int:
    """Return 0 where nothing has failed; warnings are no failure."""
    has_failed = any(finding.status == "failure" for finding in findings)
    return FAILURE_EXIT_CODE if has_failed else 0


def examine(
    question: Question, sources: Sources = HERE, run: compute.CommandRunner = compute.run_python
) -> Iterator[Finding]:
    """Yield what each check has found, as soon as it is known."""
    config, read = None, None
    if question.has_config:
        config, read = written.read_config(
            question.config, question.overrides, question.env, question.env_prefix
        )
    yield machine.check_python()
    yield machine.check_board(sources)
    yield packages.check_packages()
    yield packages.check_origins()
    yield check_backend(config, sources)
    place = yield from look_at_compute(config, sources, run)
    yield from look_at_machine(config, sources, place)
    if read is None:
        text = "no --config: keys, data and the coordinator were not looked at"
        yield skipped("config", text, "edge-sdk doctor --config device.yaml")
        return
    yield read
    if config is not None:
        yield written.check_keys(config.secret_key, config.server_key)
        yield written.check_data(config.data)
        yield from look_at_link(config, sources, session=question.session)


def check_backend(config: ClientConfig | None, sources: Sources = HERE) -> Finding:
    """Check whether there is something to compute with, and it is what the config needs."""
    found = packages.check_backend(sources)
    if config is None or found.status == "failure":
        return found
    try:
        return ok("backend", f"{found.text}; a run uses {choose_backend(config).name}")
    except ConfigError as error:
        return failure("backend", one_line(error), "change what the line names, or backend=auto")


def look_at_compute(
    config: ClientConfig | None,
    sources: Sources = HERE,
    run: compute.CommandRunner = compute.run_python,
    versions: packages.Versions = packages.version_of,
) -> Generator[Finding, None, str]:
    """Run kernels of whatever is installed, in processes of their own; returns where a run goes."""
    device = "auto" if config is None else config.device
    installed = packages.installed_backends(versions)
    used, place = _used(config, installed), "cpu"
    if TORCH.name in installed and used != TORCH.name:
        yield skipped("torch", f"a run uses {used}")
    elif TORCH.name in installed:
        more = [one for one in compute.THEIRS_TOLERANCE if versions(one) is not None]
        outcomes = compute.try_stages(device, [*KERNEL_STAGES, *more], run)
        place = str((outcomes["torch"].found or {}).get("device", device))
        yield from _torch(outcomes, place, config, sources, versions)
    if ONNXRUNTIME.name in installed:
        is_needed = used != TORCH.name
        outcome = compute.try_stages("cpu", ["onnxruntime"], run)["onnxruntime"]
        yield compute.check_onnxruntime(
            outcome, is_needed=is_needed, sources=sources, versions=versions
        )
    return place


def _used(config: ClientConfig | None, installed: Sequence[str]) -> str:
    """Return which of the *installed* libraries a run uses; in doubt the first."""
    try:
        return choose_backend(config).name if config is not None else "".join(installed[:1])
    except ConfigError:
        return "".join(installed[:1])


def _torch(
    outcomes: dict[str, compute.Outcome],
    place: str,
    config: ClientConfig | None,
    sources: Sources,
    versions: packages.Versions,
) -> Iterator[Finding]:
    device, wanted, base = ("auto", "auto", "float32")
    if config is not None:
        device, wanted, base = config.device, config.compute, config.base
    built = compute.check_torch(outcomes["torch"], device, sources, versions)
    yield built
    kernel = compute.check_kernel(outcomes["float32"], place, sources, versions)
    dtypes = ("bfloat16", "float16")
    others = (*dtypes, "quantised")
    if built.status == "failure":
        yield from (skipped(name, "torch itself fails") for name in ("kernel", *others))
        return
    yield kernel
    if kernel.status == "failure":
        yield from (skipped(name, "not even float32 works") for name in others)
        return
    for dtype in dtypes:
        yield compute.check_dtype(dtype, outcomes[dtype], place, wanted, sources)
    packed = {n: o for n, o in outcomes.items() if n not in ("torch", "float32", *dtypes)}
    yield compute.check_quantised(packed, base, sources, versions)


def look_at_machine(
    config: ClientConfig | None, sources: Sources = HERE, place: str = "auto"
) -> Iterator[Finding]:
    """Look at memory, disk, limits, heat and clock; the memory is that of *place*."""
    by_hand = None if config is None else config.profile.memory_bytes
    yield machine.check_memory(sources, on_gpu=place != "cpu", by_hand=by_hand)
    yield machine.check_swap(sources)
    yield machine.check_heat(sources)
    cache = PartCache(None if config is None else config.cache).folder
    state = Path("edge-state") if config is None else config.state
    yield machine.check_disk("cache", cache)
    yield machine.check_disk("state", state)
    yield machine.check_limits()
    yield machine.check_clock()


def look_at_link(
    config: ClientConfig, sources: Sources = HERE, *, session: bool = False
) -> Iterator[Finding]:
    """Check the way to the coordinator step by step, as far as it works."""
    later = ["name", "reach", "mtu", "handshake", "session", "link"]

    def rest(after: str) -> Iterator[Finding]:
        names = later[later.index(after) + 1 :]
        return (skipped(name, f"needs {after}") for name in names)

    name, where = links.check_name(config.coordinator)
    yield name
    if where is None:
        yield from rest("name")
        return
    _host, port, addresses = where
    finding, reached = links.check_reach(addresses, port)
    yield finding
    if reached is None:
        yield from rest("reach")
        return
    yield links.check_mtu(reached, sources.root)
    if finding.status == "failure":
        yield from (skipped(name, "needs reach") for name in later[3:])
        return
    yield from _with_keys(config, session=session)


def _with_keys(config: ClientConfig, *, session: bool) -> Iterator[Finding]:
    try:
        link = LinkConfig(
            address=config.coordinator,
            server_key=load_public_key(config.server_key),
            keys=load_key_pair(config.secret_key),
            chunk_bytes=config.chunk_bytes,
        )
        assert link.keys is not None
        shaken = links.check_handshake(shake_hands(link, links.HANDSHAKE_S), link.keys.public)
    except EdgeError as error:
        yield skipped("handshake", f"needs keys: {one_line(error)}")
        shaken = None
    if shaken is not None:
        yield shaken
    names: Sequence[str] = ("session", "link")
    if shaken is None or shaken.status == "failure":
        yield from (skipped(name, "needs handshake") for name in names)
    elif not session:
        text = "a key has one session at a time, and the device may need it; none was opened"
        yield skipped("session", text, "edge-sdk doctor --session, while the device takes no part")
        yield skipped("link", "bandwidth is measured in a session")
    else:
        yield from links.check_session(
            links.open_session(link, config.accept.model_hash), config.chunk_bytes
        )

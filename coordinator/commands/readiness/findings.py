"""What would keep a run from starting, looked at before anybody is greeted; nothing is changed.

Not here: whether the model can be cut (`check.py`), and what a device has (`edge-sdk check`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from coordinator.commands.readiness.forecast import DeviceForecast, Forecast
from coordinator.config.prompts import read_prompts
from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.gateway import port
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.page.access import read_token
from coordinator.page.listening import listen, require_page
from coordinator.planning.objective import fitting_base
from coordinator.results.run_folder import RunFolder
from coordinator.scores.measures import require_programs
from coordinator.tracking.trackers import check_trackers
from edge_sdk.data.rows import load_data, load_rows
from edge_sdk.data.tally import Tally
from edge_sdk.doctor.finding import Finding, failure, ok, skipped, warning
from edge_sdk.duration import duration
from edge_sdk.errors import ConfigError, DataError, DeviceError, EdgeError, one_line
from edge_sdk.transport.addresses import parse_address, web_address
from edge_sdk.transport.keys import fingerprint, load_key_pair

MIB = 2**20
NAME_WIDTH = 10
# The exit code of a program that would meet this failure in a run.
CODES = {"data": DataError.exit_code, "memory": DeviceError.exit_code}


def exit_code(findings: list[Finding]) -> int:
    """Return 0, or the code with which a run would end by the first failure."""
    failed = [one.check for one in findings if one.status == "failure"]
    return CODES.get(failed[0], ConfigError.exit_code) if failed else 0


def before_the_model(config: ServeConfig) -> Iterator[Finding]:
    """Look at everything that needs no model, at once."""
    yield check_run_folder(config)
    if config.trained_by == "devices":
        yield check_keys(config)
        yield check_devices(config)
        yield check_port(config.listen)
        yield check_planning(config)
    yield check_data(config)
    if config.evaluation.scores:
        yield check_scores(config)
    if config.report_to:
        yield check_report_to(config)
    if config.page is not None:
        yield check_page(config.page, config.page_token)


def check_report_to(config: ServeConfig) -> Finding:
    """Check whether everything that `report_to` names has what it needs."""
    try:
        names = list(check_trackers(config))
    except EdgeError as error:
        return failure("report_to", one_line(error).removeprefix("report_to: "))
    return ok("report_to", ", ".join(names))


def check_scores(config: ServeConfig) -> Finding:
    """Check whether the programs that count `evaluation.scores` are here."""
    scores = config.evaluation.scores
    try:
        require_programs(scores)
    except ConfigError as error:
        return failure("scores", one_line(error).removeprefix("scores: "))
    return ok("scores", ", ".join(scores))


def check_page(page: str, token: Path | None) -> Finding:
    """Check whether the page's packages are here, its address is free and its token is one."""
    try:
        require_page("page")
        address = web_address("page", page, has_token=token is not None)
        listen(address, "page").close()
        if token is not None and token.exists():
            read_token(token)
    except EdgeError as error:
        return failure("page", one_line(error))
    return ok("page", f"{address.url} is free")


def check_run_folder(config: ServeConfig) -> Finding:
    """Check whether the run's name is free."""
    if config.name is None:
        return ok("run", f"gets a folder of its own in {config.runs}, by date and time")
    path = config.runs / config.name
    if not path.exists() or (path.is_dir() and not RunFolder(path).has_checkpoint()):
        return ok("run", f"{path} is free")
    return failure("run", f"{path} exists", f"coordinator resume {path}, or another name=NAME")


def check_keys(config: ServeConfig) -> Finding:
    """Check whether the coordinator's own key is there, is one, and is secret."""
    try:
        pair = load_key_pair(config.secret_key)
    except EdgeError as error:
        return failure("keys", one_line(error), f"coordinator keygen {config.secret_key}")
    return ok("keys", f"{config.secret_key}, fingerprint {fingerprint(pair.public)}")


def check_devices(config: ServeConfig) -> Finding:
    """Check who is registered, and whether the config speaks of others."""
    cure = f"coordinator client register NAME KEY --allow-list {config.allow_list}"
    try:
        known = AllowList(config.allow_list).devices()
    except EdgeError as error:
        return failure("devices", one_line(error), cure)
    text = f"{len(known)} registered in {config.allow_list}, a round needs {config.min_devices}"
    if len(known) < config.min_devices:
        return warning("devices", f"{text}: it would wait for more", cure)
    if strangers := sorted(config.devices.keys() - known.keys()):
        named = ", ".join(strangers)
        return warning("devices", f"{text}; {named}: in the config, not in that list", cure)
    return ok("devices", text)


def check_planning(config: ServeConfig) -> Finding:
    """Check whether the config fixes what it leaves to the planner otherwise."""
    from coordinator.planning.fixed import by_hand

    if lines := by_hand(config):
        return warning("planning", "; ".join(lines))
    split, ranks = config.planning.split, config.planning.ranks
    if split == ranks == "fixed":
        return ok("planning", "none: splits and ranks as the config has them")
    return ok("planning", f"splits: {split}, ranks: {ranks}")


def check_port(listen: str) -> Finding:
    """Check whether the port can be listened at now."""
    if (error := port.obstacle(listen)) is not None:
        cure = port.cure(error, listen)
        return failure("port", f"{listen}: {error.strerror or error}", cure)
    if parse_address(listen.replace("//*:", "//0.0.0.0:")) is None:
        return ok("port", f"{listen}: any that is free")
    return ok("port", f"{listen} is free")


def check_data(config: ServeConfig) -> Finding:
    """Check whether the rows on the coordinator can be read, all of them."""
    pooled = config.trained_by == "coordinator"
    settings = config.pooled.data if pooled else config.evaluation.data
    sources = config.pooled.sources if pooled else filter(None, [settings.path])
    tally, rows = Tally(settings.bad_rows), []
    try:
        for source in sources:
            for shard in load_data(source, settings, config.training.seed, tally):
                rows += shard
        others = _others(config.evaluation)
    except EdgeError as error:
        return failure("data", one_line(error), "`edge-sdk data preview --data FILE` shows rows")
    except ModuleNotFoundError as error:
        return failure("data", one_line(error), "pip install 'edgesplit[data]'")
    if not rows:
        text = "none on the coordinator"
        if pooled:
            return failure("data", text, "pooled.data.path=FILE")
        return ok("data", text + others)
    skipped_rows = f", {count} skipped" if (count := tally.count("skipped")) else ""
    return ok("data", f"{len(rows)} rows of the schema {rows[0].schema}{skipped_rows}{others}")


def _others(evaluation: EvaluationConfig) -> str:
    """Return what else of ours is read: a file to test on, and prompts."""
    found, data = "", evaluation.data
    if evaluation.test_file is not None:
        num_rows = len(load_rows(None, replace(data, path=evaluation.test_file)))
        found = f", {num_rows} rows to test on"
    if prompts := read_prompts(evaluation):
        found += f", {len(prompts)} prompts"
    return found


# ---- what the run would take ----


def of_the_run(config: ServeConfig, found: Forecast) -> Iterator[Finding]:
    """Say what the run would take, device by device."""
    for name, own in found.devices.items():
        yield _memory(f"{name}, {own.split} blocks", own.needs_bytes, own.budget_bytes)
    for name, why in found.refused.items():
        yield failure("memory", f"{name}: {why}", "give it fewer blocks, or leave it out")
    yield _server_memory(config, found)
    for name, own in found.devices.items():
        yield ok("bytes", _bytes(config, name, own))
    yield _time(config, found)


def _memory(who: str, needs: float, budget: float) -> Finding:
    if not math.isfinite(budget):
        text = f"{who}: {needs / MIB:,.0f} MiB beside its libraries; what it has is not known"
        return ok("memory", text)
    text = f"{who}: {needs / MIB:,.0f} MiB of {budget / MIB:,.0f}"
    if needs > budget:
        return failure("memory", f"{text}: too much", "fewer blocks, smaller micro_batch, or ranks")
    return ok("memory", text)


def _server_memory(config: ServeConfig, found: Forecast) -> Finding:
    """Say what the coordinator needs, and what it would need in another base."""
    needs, budget = found.server_needs_bytes, found.server_budget_bytes
    own = _memory(f"coordinator, base: {config.base}", needs, budget)
    others = {base: size for base, size in found.server_bases.items() if base != config.base}
    said = ", ".join(f"{base} {size / MIB:,.0f}" for base, size in others.items())
    own = replace(own, text=f"{own.text}; in {said}")
    fitting = fitting_base(others, budget) if own.status == "failure" else None
    return own if fitting is None else replace(own, cure=f"base={fitting[0]}")


def _bytes(config: ServeConfig, name: str, own: DeviceForecast) -> str:
    up, down = own.up_bytes / 1e6, own.down_bytes / 1e6
    return f"{name}: at most {up:,.1f} MB up, {down:,.1f} MB down in {config.rounds} rounds"


def _time(config: ServeConfig, found: Forecast) -> Finding:
    if found.run_s is not None:
        text = f"about {duration(found.run_s)} for {config.total_steps} steps, evaluations left out"
        return ok("time", text)
    known = [f"{n} alone {duration(d.own_s)}" for n, d in found.devices.items() if d.own_s]
    return skipped("time", "; ".join(["not known", *known, *found.unknown]))

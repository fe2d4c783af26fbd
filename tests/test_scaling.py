"""What docs/scaling.md says follows from the estimates that plans are made with."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import LlamaConfig

from coordinator.aggregation.ledger import Ledger, Report
from coordinator.config.run import ServeConfig
from coordinator.lab.simulation.boards import Scale, catalogue, make_machine
from coordinator.lab.simulation.clock import Clock
from edge_sdk.config.loader import load_config
from edge_sdk.lora.adapters import Pair
from edge_sdk.lora.targets import LoraConfig, ModelFacts, Shape
from edge_sdk.model.layout import Layout, find_layout
from edge_sdk.model.shape import model_shape
from profiler.estimate.flops import estimate_flops

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")


def load_tables() -> Any:
    """The script, as a module."""
    path = ROOT / "scripts" / "scaling_tables.py"
    spec = importlib.util.spec_from_file_location("scaling_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_tables"] = module
    spec.loader.exec_module(module)
    return module


tables = load_tables()
CASES = [*tables.SERVED, *tables.FLEETS]


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_is_what_the_estimates_say(name: str) -> None:
    """Every cell stands on the page as it is computed now, in its order, and nothing else does."""
    head, rows = tables.TABLES[name]
    written = re.search(rf"<!-- Table {name}: .*?-->\n(.*?)\n<!-- End", PAGE, re.DOTALL)
    assert written is not None

    cells = [line.strip("| ").split(" | ") for line in written[1].splitlines()]

    assert [tuple(row) for row in (cells[0], *cells[2:])] == [tuple(head), *rows()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.board}-{case.blocks}")
def test_the_bounds_follow_the_formula(case: Any) -> None:
    """By hand: 4 operations a token for each frozen weight, 6 for each adapter's, and attention."""
    shape, tokens = case.shape, tables.SEQUENCES * tables.LENGTH
    blocks = shape.num_blocks - case.blocks
    frozen = blocks * sum(li.num_outputs * li.num_inputs for li in shape.linears)
    frozen += shape.vocab_size * shape.hidden_size
    adapters = blocks * tables.RANK * sum(li.num_outputs + li.num_inputs for li in shape.linears)
    attention = blocks * 14 * tables.LENGTH * shape.hidden_size
    gpu_s = tokens * (4 * frozen + 6 * adapters + attention) / (0.3 * 989e12)
    wire_bytes = tokens * shape.hidden_size * {"bfloat16": 2, "int4": 0.53125}[case.codec]

    assert case.gpu_s == pytest.approx(gpu_s, rel=1e-3)
    assert case.wire_bytes == wire_bytes
    n = case.served
    assert n * case.gpu_s <= case.step_s < (n + 1) * case.gpu_s
    assert case.carried * wire_bytes * 8 <= 25e9 * case.step_s


@pytest.mark.parametrize("case", tables.FLEETS, ids=lambda case: case.model)
@pytest.mark.parametrize("share", [0.1, 1.0, 2.0])
def test_nobody_waits_for_a_gpu_that_serves_no_more_than_it_can(case: Any, share: float) -> None:
    """On the clock of simulations N devices take the time of one, and twice as many twice as long.

    Rows are computed in the order in which they come, a step's before those of the next.
    """
    num_devices, num_steps = max(1, int(share * case.served)), 24
    ends = steps_on_a_clock(case, num_devices, num_steps)

    step_s = (ends[-1] - ends[num_steps // 2 - 1]) / (num_steps // 2)
    assert step_s == pytest.approx(max(case.step_s, num_devices * case.gpu_s), rel=0.01)


def steps_on_a_clock(case: Any, num_devices: int, num_steps: int) -> list[float]:
    """Seconds at which the GPU is done with each step of so many devices."""
    known, names = catalogue(), [f"d{number}" for number in range(num_devices)]
    machine, gpu = (
        make_machine(known.boards[board], link, utilisation=0.3, scale=Scale())
        for board, link in ((case.board, known.links[case.link]), (tables.GPU, None))
    )
    clock = Clock(dict.fromkeys(names, machine), gpu)
    own = estimate_flops(case.shape, case.work(is_device=True))
    rest = estimate_flops(case.shape, case.work(is_device=False)).total
    ends = []
    for _ in range(num_steps):
        for name in names:
            clock.compute(name, own.forward)
            clock.upload(name, case.wire_bytes)
        for name in sorted(names, key=clock.arrival_s):
            clock.serve([name], rest)
            clock.download(name, case.wire_bytes)
            clock.compute(name, own.backward)
        ends.append(clock.now_s)
    return ends


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.board}-{case.blocks}")
def test_every_device_holds_its_part(case: Any) -> None:
    """No row is about a board whose memory is too small for the blocks that it is given."""
    assert case.is_held
    # Nothing but the largest board could hold the whole model.
    assert not replace(case, blocks=case.shape.num_blocks, base="float32").is_held


TINY = tables.llama(hidden=64, intermediate=96, blocks=3, heads=4, kv_heads=2, vocab=50)


@pytest.mark.parametrize("num_devices", [1, 3, 12])
@pytest.mark.parametrize(("rule", "cap"), [("fedex", None), ("fedex", 20), ("svd", None)])
def test_what_comes_down_is_what_the_aggregation_hands_out(
    monkeypatch: pytest.MonkeyPatch, num_devices: int, rule: str, cap: int | None
) -> None:
    """After two rounds in which all factors move, byte for byte, also where ranks are capped."""
    monkeypatch.setitem(tables.MODELS, "tiny", TINY)
    case, generator = tables.Case("tiny", "", "", 2), np.random.default_rng(0)
    layout = Layout("model.layers", 3, ("front",), ((), (), ()), (), False, False)
    names = [(block, linear) for block in range(3) for linear in TINY.linears]
    targets = {
        f"model.layers.{block}.{li.name}": Shape(li.num_outputs, li.num_inputs)
        for block, li in names
    }
    facts = ModelFacts(layout, targets)
    ledger = Ledger(facts, LoraConfig(r=tables.RANK), rule, cap, seed=0)
    weights = facts.weights(0, 2)

    for _ in range(2):
        reports = {}
        for name in map(str, range(num_devices)):
            own = ledger.enrol(name, dict.fromkeys(weights, tables.RANK))
            pairs = {weight: moved(pair, generator) for weight, pair in own.items()}
            reports[name] = Report(2, 4, pairs)
        result = ledger.aggregate(reports)

    handed_out = [*result.changes_for("0").values(), *result.replaced.get("0", {}).values()]
    num_bytes = sum(factors.a_RI.nbytes + factors.b_OR.nbytes for factors in handed_out)
    expected = case.adapter_bytes() if rule == "svd" else case.handout_bytes(num_devices, cap)
    assert num_bytes == expected


def moved(pair: Pair, generator: np.random.Generator) -> Pair:
    """Factors somewhere else."""
    a, b = (x + 0.1 * generator.normal(size=x.shape) for x in (pair.a_RI, pair.b_OR))
    return Pair(a.astype(np.float32), b.astype(np.float32))


def test_the_sizes_are_those_of_the_models_code() -> None:
    """What is put together from five numbers is what transformers builds from them."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )

    built = model_shape(config, "causal-lm", find_layout(config, "causal-lm"))

    assert replace(TINY, kept=built.kept) == built
    for model, params in (("LLaMA-2-7B", 6_738_415_616), ("LLaMA-2-70B", 68_976_648_192)):
        shape = tables.MODELS[model]
        found = shape.num_blocks * shape.block_params + shape.front_params + shape.tail_params
        assert found == params


def test_what_to_set_can_be_set(tmp_path: Path) -> None:
    """The settings that the page recommends are those of a run that can begin."""
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\n{block}")

    config = load_config(ServeConfig, path, env={})

    assert config.aggregation == yaml.safe_load(block)["aggregation"]


def test_what_a_block_keeps_is_what_one_keeps() -> None:
    """The bytes that the script holds for a block are those that its code, run, is seen to keep."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1)

    built = model_shape(config, "causal-lm", find_layout(config, "causal-lm"))

    assert tables.MODELS["LLaMA-2-7B"].kept == built.kept[1:]


def test_what_is_called_measured_was_measured() -> None:
    """Cost of a device-step and of a session are those of the largest fleet that was run."""
    results = (ROOT / "benchmarks/results/2026-11-30-fleet.md").read_text("utf-8")
    table = [line.strip("| ").split(" | ") for line in results.splitlines() if line[:2] == "| "]
    largest = next(row for row in table if row[0] == "1000")

    assert pytest.approx(1e-3 * float(largest[7])) == tables.DEVICE_STEP_S
    assert 2**20 * float(largest[12]) == tables.SESSION_BYTES
    assert f"`c` = {largest[7]} ms" in PAGE

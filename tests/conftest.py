"""What every test starts from: no network, few threads, fixed seeds."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

# The same examples on every run, however slow: a green tree stays green.
# `--hypothesis-profile=default` searches.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Before anything imports torch or transformers, which read them once. One thread: tiny models gain
# nothing from more, and on a busy machine threads that wait for each other cost minutes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
for _name in [name for name in os.environ if name.startswith("EDGE_SDK_")]:
    del os.environ[_name]  # somebody's own settings would change what the tests load

TESTS = Path(__file__).parent
SHARED_DATA = TESTS.parents[1] / "shared" / "data"

# Files and folders that take longest, longest first. Where several processes share the work they
# begin with these; `scripts/test --quick` leaves these out.
SLOW = (
    "e2e/test_experiment.py",
    "test_demo.py",
    "test_notebook.py",
    "e2e/test_resume.py",
    "e2e/test_replan.py",
    "e2e/test_modes.py",
    "edge_sdk/runtime/test_conformance.py",
    "e2e/",
    "coordinator/lab/simulation/test_run.py",
    "edge_sdk/model/test_shape.py",
    "edge_sdk/model/test_quantized.py",
    "coordinator/onnx_export/",
    "coordinator/commands/readiness/",
    "edge_sdk/doctor/test_before.py",
    "coordinator/lab/comparison/",
    "test_papers.py",
    "test_examples_jetson.py",
    "test_models_page.py",
    "test_scaling.py",
    "edge_sdk/lora/test_importance_",
    "coordinator/lab/centralised/",
    "coordinator/lab/rates/",
    "coordinator/export/asked/test_texts.py",
    "coordinator/gateway/keys/test_enrolment_desk.py",
    "coordinator/scores/test_captions.py",
    "coordinator/page/test_browser.py",
    "coordinator/page/test_serving.py",
    "profiler/test_measure.py",
    "coordinator/results/test_export.py",
    "coordinator/commands/test_audit_privacy.py",
    "coordinator/commands/test_plan.py",
    "edge_sdk/model/test_partition.py",
    "coordinator/rounds/test_siege.py",
    "coordinator/engine/",
    "test_far_device.py",
    "gpu/test_script.py",
    "edge_sdk/runtime/test_torch_runtime.py",
)
# These look at all control groups or network namespaces of the machine: one process, in turn.
MACHINE = (
    "e2e/test_experiment.py",
    "coordinator/lab/experiment/test_cgroup.py",
    "coordinator/lab/experiment/test_namespace.py",
)


@pytest.hookimpl(tryfirst=True)  # before marks choose tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow and let it come first."""
    ranks = {}
    for item in items:
        place = item.path.relative_to(TESTS).as_posix()
        slow = (rank for rank, start in enumerate(SLOW) if place.startswith(start))
        ranks[item] = next(slow, len(SLOW))
        if ranks[item] < len(SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=ranks.__getitem__)


class FileScheduling(LoadFileScheduling):
    """A file's tests share a process and its fixtures; so do the files that need the machine."""

    def _split_scope(self, nodeid: str) -> str:
        place = nodeid.partition("::")[0].removeprefix("tests/")
        return "machine" if place in MACHINE else place


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    """Deal out files whatever `--dist` says; its groups by mark do nothing with our pytest."""
    return FileScheduling(config, log)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed every generator that is loaded; a light test need not wait for torch."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real models and texts; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder shared/data is not beside the repository")
    return SHARED_DATA

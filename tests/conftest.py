"""What every test starts from: no network, few threads, fixed seeds."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import settings

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

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


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

"""The notebook of the quickstart runs from its first cell to its last, as a reader's would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# Two devices and a coordinator start, train and end within one cell; machines may be busy.
CELL_S = 400


def test_the_quickstart_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, the devices learn, and the text after training comes from the adapter."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}

    nbclient.NotebookClient(notebook, timeout=CELL_S, resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    scores = [float(score) for score in re.findall(r"^round \d+: perplexity (\S+)$", said, re.M)]
    assert len(scores) == 3
    assert scores[-1] < scores[0] / 2
    assert "\nafter: " in said
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_the_notebook_is_kept_without_outputs() -> None:
    """What a run has printed belongs to whoever ran it, not to the file."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    assert not [
        cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")
    ]

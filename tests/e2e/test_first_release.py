"""What version 0.1.0 has left on disk is taken up by the version under test."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.cluster import Cluster, held_out, products, wait_all
from tests.e2e.test_resume import complete, config_of

# A run of three devices that commit 9820e37 has stopped at step 5 of 6, in its second round: the
# model, the coordinator's run folder and the devices' states.
ARCHIVE = Path(__file__).parent / "data" / "first_release.tar.gz"


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder in which the run was stopped."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_of_the_first_release_goes_on(stopped: Path, parts: Path) -> None:
    """Its checkpoints, coordinator's and devices', lead to the end of an uninterrupted run."""
    cluster = Cluster(stopped, stopped / "model", parts)
    config = config_of(cluster, labels="device", aggregation="exact")
    resumed = cluster.serve(config).start()
    clients = cluster.start(data=held_out())
    assert resumed.wait() == "completed"
    wait_all(clients)
    (stopped / "whole").mkdir()
    other = Cluster(stopped / "whole", stopped / "model", parts)

    expected = complete(other, config_of(other, labels="device", aggregation="exact"))

    assert [row["round"] for row in resumed.rows] == [0, 1, 2]
    # All three steps of each device count: none of them came without its state.
    assert resumed.rows[2]["samples"] == 3 * 4 + 3 * 6 + 3 * 4
    found, whole = products(resumed.ledger.state()), products(expected.ledger)
    assert found.keys() == whole.keys()
    for name, value in found.items():
        # Another processor than that of the archive rounds differently.
        np.testing.assert_allclose(value, whole[name], rtol=1e-4, atol=1e-6, err_msg=name)

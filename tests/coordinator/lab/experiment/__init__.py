"""Tests of `coordinator/lab/experiment`."""

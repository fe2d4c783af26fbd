"""Tests of `coordinator/remote`."""

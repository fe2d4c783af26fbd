"""Tests of `coordinator/planning`."""

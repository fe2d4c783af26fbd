"""Tests of `coordinator/rounds`."""

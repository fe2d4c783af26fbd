"""Tests of `coordinator/engine`."""

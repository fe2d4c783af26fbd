"""Tests of `coordinator/export/asked`."""

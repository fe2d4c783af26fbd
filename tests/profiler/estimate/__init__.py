"""Tests of `profiler/estimate`."""

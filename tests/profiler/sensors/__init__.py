"""Tests of `profiler/sensors`."""

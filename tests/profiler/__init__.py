"""Tests of profiler, one file per source file."""

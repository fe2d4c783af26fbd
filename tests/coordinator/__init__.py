"""Tests of coordinator, one file per source file."""

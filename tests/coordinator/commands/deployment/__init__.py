"""Tests of `coordinator/commands/deployment`."""

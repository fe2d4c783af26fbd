"""Tests of `coordinator/commands/readiness`."""

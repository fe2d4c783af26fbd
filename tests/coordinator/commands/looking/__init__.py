"""Tests of `coordinator/commands/looking`."""

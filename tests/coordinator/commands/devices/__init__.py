"""Tests of `coordinator/commands/devices`."""

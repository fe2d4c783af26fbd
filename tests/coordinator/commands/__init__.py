"""Tests of `coordinator/commands`."""

"""Tests of `coordinator/fleet`."""

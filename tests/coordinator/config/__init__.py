"""Tests of `coordinator/config`."""

"""Tests of `coordinator/page`."""

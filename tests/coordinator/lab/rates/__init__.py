"""Tests of `coordinator/lab/rates`."""

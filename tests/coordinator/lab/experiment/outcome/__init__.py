"""Tests of what is read back and reported."""

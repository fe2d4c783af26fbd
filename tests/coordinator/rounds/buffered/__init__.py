"""Tests of rounds without a barrier."""

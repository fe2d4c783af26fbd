"""Tests of the engine on Ray."""

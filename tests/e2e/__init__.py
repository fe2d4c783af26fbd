"""Tests of device and coordinator together."""

"""Tests of `coordinator/gateway/enrolment`."""

"""Tests of the loop of prefill and mixed."""

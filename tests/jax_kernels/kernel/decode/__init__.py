"""Tests of the loop of decode."""

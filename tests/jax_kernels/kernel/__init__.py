"""Tests of the rooms of the kernel."""

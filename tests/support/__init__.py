"""Batches, an independent float64 oracle, and error budgets shared by the tests."""

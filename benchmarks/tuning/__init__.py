"""Tuning of block sizes: the search, the trials, and the data file they fill."""

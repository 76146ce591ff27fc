"""Continuous batching beside padded batches and transformers' own, on a CPU."""

"""The loop of prefill and mixed: tiles of queries, one cell at a time."""

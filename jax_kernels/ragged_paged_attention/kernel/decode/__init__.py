"""The loop of decode: one query token for each sequence, several cells in a step."""

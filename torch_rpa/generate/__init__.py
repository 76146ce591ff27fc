"""Generates text for several prompts at once: ``python -m torch_rpa.generate``."""

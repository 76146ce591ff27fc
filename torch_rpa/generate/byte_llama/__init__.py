"""The built-in model: a byte-level Llama trained on the text inside every Python."""

from __future__ import annotations

from pathlib import Path

# What ``AutoModelForCausalLM.from_pretrained`` reads.
WEIGHTS = Path(__file__).with_name("weights")

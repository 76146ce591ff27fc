"""What the command line takes if it is not told otherwise, and which names it knows.

It is imported before the command line is read, and so without torch.
"""

from __future__ import annotations

DEFAULT_PROMPTS = (
    "Once upon a time",
    "def attention(q, k, v):",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "1, 1, 2, 3, 5, 8,",
)
MODEL_DTYPES = ("float32", "bfloat16")
# All prompts run at once up to so many, and up to so many tokens in one step.
USUAL_SEQUENCES, USUAL_STEP_TOKENS = 16, 256
USUAL_NEW_TOKENS = 48

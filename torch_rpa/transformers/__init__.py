"""Ragged paged attention for Hugging Face models: ``attn_implementation="rpa"``.

Importing this package registers the attention function. A step is then::

    logits = model(
        input_ids=tokens,  # [1, T], all sequences end to end
        position_ids=positions,  # [1, T]
        use_cache=False,
        rpa=RPAContext(kv_caches, batch),
        logits_to_keep=last_tokens,  # [S]
    ).logits  # [1, S, vocabulary]
"""

from torch_rpa.transformers.attention import (
    ATTENTION_NAME,
    register,
    rpa_attention,
    use_rpa,
)
from torch_rpa.transformers.context import (
    RaggedBatch,
    RPAContext,
    empty_kv_caches,
)

__all__ = [
    "ATTENTION_NAME",
    "RPAContext",
    "RaggedBatch",
    "empty_kv_caches",
    "register",
    "rpa_attention",
    "use_rpa",
]

register()

"""Ragged paged attention for Hugging Face models: ``attn_implementation="rpa"``.

Importing this package registers the attention function. A step is then::

    logits = model(
        input_ids=tokens,  # [1, T], all sequences end to end
        position_ids=positions,  # [1, T]
        use_cache=False,
        rpa=RPAContext(kv_caches, batch),
        logits_to_keep=last_tokens,  # [S]
    ).logits  # [1, S, vocabulary]

and the whole of generation is ``model.generate(..., custom_generate=generate)``, or, if
the call cannot be changed, ``with paged_generation(model): model.generate(...)``.
"""

# ruff: noqa: E402
from torch_rpa.transformers import versions

versions.require_supported()  # before anything below imports transformers

from torch_rpa.transformers.attention import (
    register,
    rpa_attention,
    use_rpa,
)
from torch_rpa.transformers.context import (
    RaggedBatch,
    RPAContext,
    empty_kv_caches,
)
from torch_rpa.transformers.generation import generate
from torch_rpa.transformers.guards import ATTENTION_NAME
from torch_rpa.transformers.paged_cache import PagedCache
from torch_rpa.transformers.paged_generation import paged_generation

__all__ = [
    "ATTENTION_NAME",
    "PagedCache",
    "RPAContext",
    "RaggedBatch",
    "empty_kv_caches",
    "generate",
    "paged_generation",
    "register",
    "rpa_attention",
    "use_rpa",
]

register()

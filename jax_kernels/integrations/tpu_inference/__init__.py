"""The kernel as an attention backend of vLLM on JAX, which is tpu-inference.

``vllm serve --attention-backend torch_rpa`` selects it. vLLM finds ``register`` by an
entry point; nothing else is imported before the backend is selected.

==================  =================================================================
``cache_shape``     the cache in a shape that the engine can shard and cut by pages
``sharded``         one call of the kernel on each device of a mesh
``backend``         the engine's interface, over ``sharded``
``vllm_backend``    the classes that vLLM gives to the layers of a model
``other_kernels``   no kernel of the engine reads a cache that is not in its layout
==================  =================================================================
"""

import logging

NAME = "torch_rpa"

_logger = logging.getLogger(__name__)


def register() -> None:
    """Adds the backend to those of tpu-inference, where there is one that takes some.

    vLLM calls it in every environment that has this package, in each process and
    perhaps more than once, so that it must not fail anywhere.
    """
    try:
        from tpu_inference.layers.common import (  # pyright: ignore[reportMissingImports]
            attention_backend,
        )
    except ImportError as error:
        _logger.info("%s is not used, tpu-inference 0.32 is needed: %s", NAME, error)
        return
    attention_backend.register_attention_backend(
        NAME, attention=_make, vllm_backend=f"{__name__}.vllm_backend.TorchRpaBackend"
    )


def _make():
    from jax_kernels.integrations.tpu_inference import backend, other_kernels

    made = backend.TorchRpaAttention()
    other_kernels.replace_by(made)
    return made

"""The documented torch function: checks, choice of implementation, operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jax_kernels.contract.options import Attend, check_block_sizes
from torch_rpa import bridges, ops, reference, validation
from torch_rpa.options import make_options, split_tensors
from torch_rpa.validation import Inputs

IMPLEMENTATIONS = (None, "reference", "pallas_interpret")


def ragged_paged_attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    kv_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    page_indices: torch.Tensor,
    cu_q_lens: torch.Tensor,
    distribution: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    sm_scale: float = 1.0,
    causal: bool = True,
    causal_block: int | None = None,
    sliding_window: int | None = None,
    attend: Attend = "all",
    soft_cap: float | None = None,
    q_scale: float | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    update_kv_cache: bool = True,
    chunk_prefill_size: int | None = None,
    decode_q_len: int = 1,
    probabilities_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    block_sizes: Sequence[int] | None = None,
    impl: str | None = None,
    validate: bool | None = None,
) -> Any:
    """Attention of a ragged batch over a paged cache, which takes up the new tokens.

    ``S`` sequences bring ``T`` tokens in all, of any length each. The new tokens of a
    sequence are its last positions: their keys and values are written to the cache, and
    each query attends to its sequence as the cache stores it. All shapes are static:
    pad ``T`` and ``S`` and say in ``distribution`` how many sequences are live.

    On an XLA device the cache stays in its buffer, in lazy mode and under
    ``torch.compile(backend="openxla")``, provided that each layer has a tensor of its
    own (an update through a view of a larger one copies it) and that
    ``torch_xla.sync()`` ends each step.

    Args:
        q: ``[T, Hq, D]`` bfloat16 or float32. Sequence ``s`` owns the rows
            ``cu_q_lens[s] .. cu_q_lens[s + 1]``.
        k: ``[T, Hkv, D]``, dtype of ``q``; ``Hq`` is a multiple of ``Hkv``. If
            ``update_kv_cache`` is False, both ``k`` and ``v`` may be None; they are not
            used.
        v: Like ``k``.
        kv_cache: See :func:`torch_rpa.kv_cache_shape`. Changed in place: the slots of
            the new tokens, nothing else. bfloat16, float32, float8_e4m3fn, float8_e5m2
            or int8. A NaN stored in float8_e4m3fn counts as 480 on v5e and v6e, whose
            own e4m3 has that number there.
        kv_lens: ``[S]`` int32, tokens of each sequence, the new ones included.
        page_indices: ``[S * P]`` int32. Token ``t`` of sequence ``s`` is in page
            ``page_indices[s * P + t // page_size]``. Entries past the last live page of
            a sequence are ignored.
        cu_q_lens: ``[S + 1]`` int32, running sums of the numbers of new tokens.
        distribution: ``[3]`` int32 ``(i, j, k)``: sequences ``[0, i)`` have at most
            ``decode_q_len`` new tokens, ``[i, j)`` have ``chunk_prefill_size``,
            ``[j, k)`` any number. A sequence without a new token is skipped wherever it
            stands. Entries of the other arguments at or past ``k`` are ignored.
        sinks: ``[Hq]`` float32 logits of one extra key per head with a zero value. +inf
            takes all the weight, so that the head gives zeros; -inf takes none.
        sm_scale: Factor on the scores, usually ``D ** -0.5``: 0, or from 2**-120 to
            2**120 in size, negative ones included.
        causal: Hide keys after the query's own position.
        causal_block: With ``causal``, hide only the keys after the query's own block of
            so many positions, a power of two, as models of block diffusion do. Blocks
            count from the start of the sequence. Keys that come in a later step are not
            seen: pass the tokens of a block in one step.
        sliding_window: See only the last ``sliding_window`` positions. A window as long
            as the context sees all.
        attend: Of these keys, see "all"; those whose tokens were in the "cache" before
            this call; or those that are "new" in it. All new tokens are written in
            any case. With ``return_lse``, :func:`torch_rpa.merge_attention` joins
            attention over parts of the keys.
        soft_cap: Replace scores by ``soft_cap * tanh(score / soft_cap)``.
        q_scale: With a quantised cache, quantise ``q`` as well, as
            ``q * float32(1 / q_scale)`` in its dtype. This and the next two are
            numbers, or tensors on the device of ``q``: float32 ``[]``, or ``[Hkv]``
            with one for each key head. A new number is a new program on an XLA device;
            one program serves all values of a tensor, but for ``[]`` of 1, which
            PyTorch/XLA takes for a constant. The inverse of a tensor's number
            is rounded to nearest, so that it is that of the equal Python number. The
            numbers must be positive, from 2**-120 to 2**120. In a tensor only
            ``validate`` checks them.
        k_scale: The cache stores ``k * float32(1 / k_scale)``, and scores are
            multiplied by ``k_scale``. The inverse is computed in float64, the product
            in float32; it is clipped to the finite range of a quantised cache, then
            rounded to nearest, ties to even. The same bytes come out on every device,
            but for NaN, which stays NaN in one of its codes.
        v_scale: The cache stores ``v * float32(1 / v_scale)`` likewise, and the output
            is multiplied by ``v_scale``.
        update_kv_cache: False writes nothing and reads all keys from the cache.
        chunk_prefill_size: Tokens of each of the sequences ``[i, j)``.
        decode_q_len: Most new tokens of a sequence of ``[0, i)``, from 1 to 16. More
            than one is for sequences of few new tokens at long contexts, which
            ``[j, k)`` serves several times slower: drafts to verify, last chunks of a
            prefill, short suffixes. All sequences of ``[0, i)`` have the work of so
            many tokens, so take the least that serves.
        probabilities_dtype: ``torch.float8_e4m3fn`` lets prefill round probabilities to
            it before they meet the values, for which the cache must be of that dtype
            too. TPU7x then multiplies at twice the rate; other devices round nothing. A
            weight is off by up to about 2**-4 of itself, or 2**-14 of the largest. None
            never rounds so.
        out_dtype: bfloat16 or float32; None is the dtype of ``q``.
        return_lse: Return the natural logarithm of the denominator of the softmax as
            well, sinks included.
        batch_invariant: A query gets the same bits whatever else is in the batch, in
            whichever range its sequence is, however its sequence was cut into steps,
            and whatever ``T``, ``S`` and ``P`` are: its output is a function of its own
            numbers, of the keys and values that it sees, and of what is static. It
            holds on one kind of device at a time. On a TPU decodes become slower. On
            the CPU every query attends alone. If ``block_sizes`` are given, all calls
            have to be given the same.
        block_sizes: Tile sizes of the kernel, ``(decode_block_kv, block_q, block_kv)``,
            powers of two: tokens of the cache that decode fetches at once, query tokens
            of a tile of prefill, tokens of the cache fetched at once there. None takes
            those tuned for the shape, users' own records first (see
            :func:`torch_rpa.tuned_block_sizes`), or else those of a model. They change
            speed and the order of sums only. Eager PyTorch and the plain computation
            have no tiles: there they are checked and have no effect.
        impl: None takes the implementation of the device: the Pallas kernel on a TPU,
            the same computation in plain XLA on the XLA CPU device, eager PyTorch on
            CPU tensors. "reference" takes the plain computation on every device,
            and on CPU tensors the one that goes sequence by sequence.
            "pallas_interpret" runs the Pallas kernel on CPU tensors, simulated: slow,
            for debugging. Nothing falls back silently.
        validate: True checks the values of the metadata, and of scales that are
            tensors, first, waiting for them. Otherwise they are checked if the
            environment variable ``TORCH_RPA_VALIDATE`` is 1, true, yes or on. On CPU
            tensors, lengths and page ids that lead out of a tensor are always refused.

    Returns:
        ``[T, Hq, D]``. Rows of no live sequence, and rows that see no key, are zeros.
        With ``return_lse`` a tuple of this and float32 ``[T, Hq]``, whose rows are
        minus infinity there; with sinks, rows that see no key have the sink.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or value.
        NotImplementedError: A dtype, head_dim, combination or device that is not
            supported, or a gradient is asked for. The message names another way.
    """
    options = {
        "sm_scale": sm_scale,
        "causal": causal,
        "causal_block": causal_block,
        "sliding_window": sliding_window,
        "attend": attend,
        "soft_cap": soft_cap,
        "q_scale": q_scale,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "update_kv_cache": update_kv_cache,
        "chunk_prefill_size": chunk_prefill_size,
        "decode_q_len": decode_q_len,
        "probabilities_dtype": probabilities_dtype,
        "out_dtype": out_dtype,
        "return_lse": return_lse,
        "batch_invariant": batch_invariant,
        "block_sizes": check_block_sizes(block_sizes),
    }
    metadata = (kv_lens, page_indices, cu_q_lens, distribution)
    tensors, options = split_tensors(options)
    inputs = Inputs(q, k, v, kv_cache, *metadata, sinks, **tensors)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    if not torch.compiler.is_compiling():  # there the operator's fake checks them
        # The dispatcher makes numbers of flags, tensors and arrays of one element, and
        # has words of its own for what it cannot convert.
        make_options(options)
    if validate:
        validation.validate_values(inputs, make_options(options))
    if impl is None:
        return _call_operator(inputs, options)
    return _run_selected(impl, inputs, options)


def _call_operator(inputs: Inputs, options: dict[str, Any]) -> Any:
    """Calls the operator that returns what the options ask for."""
    operators = ops.WITH_LSE if options["return_lse"] else ops.WITHOUT_LSE
    options = {name: x for name, x in options.items() if name != "return_lse"}
    return operators.public(*inputs, **options)


def _run_selected(impl: str, inputs: Inputs, options: dict[str, Any]) -> Any:
    """Runs an implementation other than the device's own."""
    validation.validate_gradients(inputs)
    device = inputs.q.device.type
    if impl == "pallas_interpret" or device == "cpu":
        attention_options = make_options(options)
        if validation.values_requested():
            validation.validate_values(inputs, attention_options)
        if impl == "reference":
            if attention_options.batch_invariant:
                raise NotImplementedError(
                    "batch_invariant is not supported with impl='reference' on CPU "
                    "tensors, whose sums follow the batch: leave impl out"
                )
            return reference.ragged_paged_attention_(inputs, attention_options)
        from torch_rpa.bridges import interpret

        return interpret.interpret_pallas_(
            inputs, attention_options, block_sizes=options["block_sizes"]
        )
    bridge = bridges.find(device)
    if bridge is None:  # the operator says which devices there are
        return _call_operator(inputs, options)
    with bridge.reference(inputs.q.device):
        return _call_operator(inputs, options)

"""In which dtypes numbers meet, and by which factors: it changes speed and rounding."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_kernels.chips import E4M3FN_BIAS, Chip
from jax_kernels.contract import AttentionOptions
from jax_kernels.ragged_paged_attention.layout import dtype_packing

LOG2_E = math.log2(math.e)


class HeadFactor(NamedTuple):
    """A factor with a value for each key head, because a scale is an array.

    Attributes:
      name: What it multiplies, in the place of a constant: "query", "score", new "key",
        new "value" or "output".
      constant: The part of it that is no array.
      scales: Options whose values are factors of it.
      is_inverse: Whether it is the inverse of the only scale.
    """

    name: str
    constant: float
    scales: tuple[str, ...]
    is_inverse: bool = False


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How one launch computes with the numbers that it is given.

    Scores are kept in units of log2, since the hardware has exp2 and not exp.

    Attributes:
      query_multiplier: Factor folded into the queries before they meet the keys. With
        quantised queries it is the inverse of their scale. Otherwise it holds every
        factor of the score, so that the score needs no further arithmetic.
      quantised_multiplier: The same for queries that were rounded to
        ``quantised_dtype``: a power of two, which rounds nothing.
      score_multiplier: Factor left for the product of multiplied queries and stored
        keys. With a soft cap the product is then in units of the cap.
      score_cap: The soft cap in units of log2, or None.
      output_scale: Factor of the weighted values.
      key_multiplier: Factor of new keys before they are stored; None if there is none.
      value_multiplier: The same of new values.
      quantised_dtype: Dtype that queries are rounded to first, that of the cache; None
        if they are not quantised.
      multiply_dtype: Dtype in which queries meet keys.
      value_dtype: Dtype in which probabilities meet values: the wider of queries and
        cache.
      float8_probabilities: Dtype in which those of prefill do where it is float8; None
        if they are of ``value_dtype``.
      reads_e4m3_shifted: Whether e4m3fn is multiplied as e4m3b11fnuz, the e4m3 of the
        chip. The same bits are a power of two less there. Other factors make up for
        it, which the compiler would apply to every score and every product instead.
      rounds_in_software: Whether the chip has no instruction that packs new tokens for
        the cache.
      packs_16_bits: Whether new tokens in bfloat16 are packed without being widened.
      rounds_in_16_bits: Whether ``tile_io.bfloat16_to_e4m3fn`` packs the new tokens.
      sums_in_matrix_unit: Whether the matrix units have columns to spare for sums.
      sums_are_parts: Whether each lane of a row's sum holds a part of it, not all: the
        vector units add float8 probabilities, and lanes are added at the end.
      exponent_multiplier: Factor of the products of queries and keys that float8
        probabilities apply to exponents in bfloat16; 1 if scores have it already.
      head_factors: What differs by key head. The constant in its place is then 1, or
        None.
    """

    query_multiplier: float
    quantised_multiplier: float
    score_multiplier: float
    score_cap: float | None
    output_scale: float
    key_multiplier: float | None
    value_multiplier: float | None
    quantised_dtype: np.dtype | None
    multiply_dtype: np.dtype
    value_dtype: np.dtype
    float8_probabilities: np.dtype | None
    reads_e4m3_shifted: bool
    rounds_in_software: bool
    packs_16_bits: bool
    rounds_in_16_bits: bool
    sums_in_matrix_unit: bool
    sums_are_parts: bool
    exponent_multiplier: float
    head_factors: tuple[HeadFactor, ...] = ()

    @property
    def masked_packing(self) -> int:
        """Probabilities that share a word when those of unseen keys become zeros.

        The vector units sum them in float32, the matrix units as they meet values.
        """
        return dtype_packing(self.value_dtype) if self.sums_in_matrix_unit else 1


def choose(
    options: AttentionOptions,
    chip: Chip,
    *,
    q_dtype: np.dtype,
    cache_dtype: np.dtype,
    lanes: int,
    array_options: tuple[str, ...] = (),
) -> Numerics:
    """The numerics of a launch.

    Args:
      options: What is computed.
      chip: What it is compiled for.
      q_dtype: Dtype of queries, keys and values as the caller has them.
      cache_dtype: Dtype of the cache.
      lanes: Length of a packed row.
      array_options: Scales that are arrays, which are None among the options.
    """
    is_wide = jnp.float32 in (q_dtype, cache_dtype)
    value_dtype = jnp.dtype(jnp.float32 if is_wide else jnp.bfloat16)
    is_bfloat16 = value_dtype == jnp.bfloat16
    is_e4m3fn = cache_dtype == jnp.float8_e4m3fn

    is_shifted = is_e4m3fn and is_bfloat16 and chip.e4m3_bias != E4M3FN_BIAS
    shift = 2.0 ** (chip.e4m3_bias - E4M3FN_BIAS) if is_shifted else 1.0

    # With a soft cap, scores are first in units of the cap.
    unit = LOG2_E if options.soft_cap is None else 1.0 / options.soft_cap
    score_factor = options.sm_scale * (options.k_scale or 1.0) * unit
    is_quantised = bool(options.q_scale) or "q_scale" in array_options
    if is_quantised:
        q_scale = options.q_scale or 1.0
        query_multiplier = 1.0 / q_scale
        score_multiplier = q_scale * score_factor
    else:
        query_multiplier, score_multiplier = score_factor, 1.0

    float8 = _float8_probabilities(options, chip, cache_dtype) if is_bfloat16 else None
    sums_in_matrix_unit = is_bfloat16 and lanes < chip.matrix_columns
    quantised_dtype = cache_dtype if is_quantised else None
    # Scores in float8 come in bursts. They pay where the products of values do not
    # take most of the time, or are float8 too.
    is_as_stored = quantised_dtype is not None and (
        jnp.issubdtype(cache_dtype, jnp.integer)
        or (_is_native(cache_dtype, chip) and (sums_in_matrix_unit or float8))
    )
    multiply_dtype = cache_dtype if is_as_stored else value_dtype
    query_shift = 1.0 if is_as_stored else shift
    if not is_quantised:
        query_multiplier *= query_shift
    key_multiplier = 1.0 / options.k_scale if options.k_scale else None
    value_multiplier = 1.0 / options.v_scale if options.v_scale else None
    output_scale = (options.v_scale or 1.0) * shift

    head_factors = []
    scales_of_scores = tuple(x for x in ("q_scale", "k_scale") if x in array_options)
    if scales_of_scores:
        if is_quantised:
            head_factors.append(HeadFactor("score", score_multiplier, scales_of_scores))
            score_multiplier = 1.0
        else:
            head_factors.append(HeadFactor("query", query_multiplier, scales_of_scores))
            query_multiplier = 1.0
    inverses = {"q_scale": "query"}
    if options.update_kv_cache:
        inverses |= {"k_scale": "key", "v_scale": "value"}
    for scale, name in inverses.items():
        if scale in array_options:
            head_factors.append(HeadFactor(name, 1.0, (scale,), is_inverse=True))
    if "v_scale" in array_options:
        head_factors.append(HeadFactor("output", output_scale, ("v_scale",)))
        output_scale = 1.0

    is_folded = float8 is not None and options.soft_cap is None and options.sm_scale

    in_software = is_e4m3fn and not chip.rounds_to_e4m3fn
    has_scale = options.k_scale is not None or options.v_scale is not None
    has_scale |= "k_scale" in array_options or "v_scale" in array_options
    is_16_bits = q_dtype == jnp.bfloat16 and not has_scale
    rounds_in_16_bits = is_16_bits and in_software and chip.adds_in_16_bits
    return Numerics(
        query_multiplier=query_multiplier,
        quantised_multiplier=query_shift if is_quantised else 1.0,
        score_multiplier=score_multiplier,
        score_cap=None if options.soft_cap is None else options.soft_cap * LOG2_E,
        output_scale=output_scale,
        key_multiplier=key_multiplier,
        value_multiplier=value_multiplier,
        quantised_dtype=quantised_dtype,
        multiply_dtype=multiply_dtype,
        value_dtype=value_dtype,
        float8_probabilities=float8,
        reads_e4m3_shifted=is_shifted,
        rounds_in_software=in_software,
        packs_16_bits=rounds_in_16_bits or (is_16_bits and cache_dtype == q_dtype),
        rounds_in_16_bits=rounds_in_16_bits,
        sums_in_matrix_unit=sums_in_matrix_unit,
        sums_are_parts=float8 is not None and not sums_in_matrix_unit,
        exponent_multiplier=score_multiplier if is_folded else 1.0,
        head_factors=tuple(head_factors),
    )


def _float8_probabilities(
    options: AttentionOptions, chip: Chip, cache_dtype: np.dtype
) -> np.dtype | None:
    """Those that are allowed, where products with values are faster with them.

    A window is short, and its rows have no anchors. New tokens alone have none either.
    """
    if options.probabilities_dtype is None or options.sliding_window is not None:
        return None
    if options.attend == "new":
        return None
    dtype = jnp.dtype(options.probabilities_dtype)
    is_native = _is_native(dtype, chip) and chip.rounds_to_e4m3fn
    return dtype if is_native and dtype == cache_dtype else None


def _is_native(dtype: np.dtype, chip: Chip) -> bool:
    """Whether matrix units multiply two operands of a float8 dtype as they are."""
    is_shifted = dtype == jnp.float8_e4m3fn and chip.e4m3_bias != E4M3FN_BIAS
    return chip.multiplies_float8 and not is_shifted

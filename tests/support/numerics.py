"""Error budgets that come from data, and exact comparison of caches.

The budget of an output is twice the error, against float64, of an emulation that
rounds where a fast kernel must round: scaled queries to the dtype of the queries,
probabilities to the same dtype, all else in float32. To that comes the rounding of the
output. Errors are measured relative to ``Expected.magnitude``, the size of the terms
that were added, so that long and short sequences share one figure.
"""

import dataclasses
import math

import ml_dtypes
import numpy as np

from tests.support import oracle

_LOG2_E = math.log2(math.e)
_FLOAT32_EPS = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class ErrorBudget:
    """How far an output may be from float64.

    Attributes:
      absolute: float64[T, Hq, D], bound of each element.
      relative_rms: Bound of the root mean square of error / magnitude.
    """

    absolute: np.ndarray
    relative_rms: float


def emulate_low_precision(
    queries,
    kv_cache,
    kv_lens,
    page_indices,
    cu_q_lens,
    distribution,
    sinks=None,
    *,
    sm_scale: float = 1.0,
    causal: bool = True,
    causal_block: int | None = None,
    sliding_window: int | None = None,
    attend: str = "all",
    soft_cap: float | None = None,
    q_scale: oracle.Scale = None,
    k_scale: oracle.Scale = None,
    v_scale: oracle.Scale = None,
    probabilities_dtype: str | None = None,
    needs_no_new_tokens: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention float32[T, Hq, D] rounded where a kernel rounds, and its lse.

    Args:
      kv_cache: The cache after the update.
      probabilities_dtype: As given to the operator. The exponents of such
        probabilities are bfloat16. The largest is 16, which leaves room above it and
        is a bound on what is lost below, and the weights have a sum of one.
      needs_no_new_tokens: Whether new tokens have no slots.
    """
    num_tokens, num_q_heads, head_dim = queries.shape
    q_dtype = queries.dtype
    page_size = oracle.cache_page_size(kv_cache)
    num_kv_heads = oracle.cache_kv_heads(kv_cache, head_dim)
    address = oracle.slot_address(kv_cache, num_kv_heads, head_dim, page_size)
    scale = sm_scale * (1.0 if soft_cap else _LOG2_E)
    if q_scale is None:
        factor = np.float32(scale * oracle.of_heads(k_scale, num_q_heads))
        scaled = (queries.astype(np.float32) * factor).astype(q_dtype)
        score_scale = np.ones((num_kv_heads, 1, 1), np.float32)
    else:
        scaled = oracle.store(queries, kv_cache.dtype, q_scale)
        factor = scale * oracle.of_heads(q_scale, num_kv_heads)
        factor = factor * oracle.of_heads(k_scale, num_kv_heads)
        score_scale = factor.astype(np.float32)[..., None]
    out = np.zeros((num_tokens, num_q_heads, head_dim), np.float32)
    lse = np.full(out.shape[:2], -np.inf, np.float32)
    for sequence in oracle.live_sequences(
        kv_lens, page_indices, cu_q_lens, distribution, page_size
    ):
        end = sequence.kv_len - (sequence.q_len if needs_no_new_tokens else 0)
        stored = oracle.read_slots(
            kv_cache, address, sequence.pages[:end], sequence.slots[:end]
        )
        keys, values = (x.astype(np.float32).swapaxes(0, 1) for x in stored)
        rows = slice(sequence.first_row, sequence.first_row + sequence.q_len)
        tile = scaled[rows].astype(np.float32).swapaxes(0, 1)  # [Hq, q_len, D]
        rows_of_head = num_q_heads // num_kv_heads * sequence.q_len
        tile = tile.reshape(num_kv_heads, rows_of_head, head_dim)
        scores = (tile @ keys.swapaxes(1, 2)) * score_scale
        if soft_cap is not None:
            cap = np.float32(soft_cap)
            scores = np.float32(_LOG2_E) * (cap * np.tanh(scores / cap))
        scores = scores.reshape(num_q_heads, sequence.q_len, end)
        for i in range(sequence.q_len):
            seen = oracle.visible_positions(
                sequence.kv_len - sequence.q_len + i,
                sequence.kv_len,
                causal,
                sliding_window,
                attend,
                sequence.q_len,
                causal_block,
            )
            scores[:, i, : seen.start] = -np.inf
            scores[:, i, seen.stop :] = -np.inf
        row_max = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        total = np.zeros_like(row_max)
        if sinks is not None:
            sink = sinks.astype(np.float32)[:, None, None] * np.float32(_LOG2_E)
            row_max = np.maximum(row_max, sink)
            total = np.exp2(sink - row_max)
        row_max = np.where(np.isneginf(row_max), np.float32(0), row_max)
        exponents = scores - row_max
        if probabilities_dtype is None:
            weights = np.exp2(exponents)
            total = total + weights.sum(axis=-1, keepdims=True)
            weights = weights.astype(q_dtype).astype(np.float32)
        else:
            exponents = exponents.astype(ml_dtypes.bfloat16).astype(np.float32)
            weights = (np.exp2(exponents) * 16).astype(np.dtype(probabilities_dtype))
            weights = weights.astype(np.float32) / 16
            total = total + weights.sum(axis=-1, keepdims=True)
        tile = weights.reshape(num_kv_heads, rows_of_head, end) @ values
        tile = tile.reshape(num_q_heads, sequence.q_len, head_dim)
        output_scale = oracle.of_heads(v_scale, num_q_heads).astype(np.float32)
        tile = tile * output_scale[..., None] / np.where(total == 0, 1, total)
        out[rows] = tile.swapaxes(0, 1)
        with np.errstate(divide="ignore"):
            logarithm = (row_max + np.log2(total)) / np.float32(_LOG2_E)
        lse[rows] = logarithm[..., 0].swapaxes(0, 1)
    return out, lse


def error_budget(
    expected: oracle.Expected, emulated: np.ndarray, q_dtype, out_dtype
) -> ErrorBudget:
    """The budget that an emulation justifies.

    Args:
      expected: The truth.
      emulated: Output of ``emulate_low_precision`` for the same arguments.
      q_dtype: Dtype of the queries, or a narrower one of probabilities. One rounding
        to it is always allowed: a small batch can be lucky.
      out_dtype: Dtype of the output that will be judged.
    """
    magnitude = expected.magnitude
    relative = _relative_error(emulated, expected)
    one_rounding = _unit_roundoff(q_dtype)
    float32_band = 16 * _FLOAT32_EPS
    worst = 2 * max(relative.max(initial=0.0), one_rounding) + float32_band
    absolute = worst * magnitude
    absolute += _unit_roundoff(out_dtype) * (abs(expected.out) + absolute)
    rms = 2 * _rms(relative) + one_rounding / 4 + float32_band
    rms += _unit_roundoff(out_dtype)
    return ErrorBudget(absolute=absolute, relative_rms=rms)


def assert_output_within_budget(
    out: np.ndarray, expected: oracle.Expected, budget: ErrorBudget
) -> None:
    """Fails unless every element, and the error as a whole, is within the budget."""
    out = np.asarray(out)
    assert out.shape == expected.out.shape, f"{out.shape=} {expected.out.shape=}"
    out = out.astype(np.float64)
    where = np.argwhere(~np.isfinite(out))
    assert not len(where), f"{len(where)} non-finite outputs, first at {where[0]}"
    excess = abs(out - expected.out) - budget.absolute
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, (
        f"{(excess > 0).sum()} of {excess.size} outputs exceed their budget; the worst "
        f"at {tuple(map(int, worst))}: got {out[worst]:.8g}, expected "
        f"{expected.out[worst]:.8g} within {budget.absolute[worst]:.3g}"
    )
    rms = _rms(_relative_error(out, expected))
    assert rms <= budget.relative_rms, f"{rms=:.3g} {budget.relative_rms=:.3g}"


def assert_lse_within_budget(
    lse: np.ndarray, expected: oracle.Expected, emulated: np.ndarray, q_dtype
) -> None:
    """Fails unless every logarithm is within twice the error of the emulation.

    The sum may be that of rounded probabilities, so one rounding is always allowed.
    """
    lse = np.asarray(lse)
    assert lse.dtype == np.float32 and lse.shape == expected.lse.shape
    is_finite = np.isfinite(expected.lse)
    np.testing.assert_array_equal(lse[~is_finite], expected.lse[~is_finite])
    right, got = expected.lse[is_finite], lse[is_finite].astype(np.float64)
    emulated_error = abs(emulated[is_finite] - right).max(initial=0.0)
    budget = 2 * max(emulated_error, _unit_roundoff(q_dtype))
    error = abs(got - right) - 16 * _FLOAT32_EPS * (1 + abs(right))
    assert error.max(initial=0.0) <= budget, f"{error.max()=:.3g} {budget=:.3g}"


def assert_same_bytes(actual: np.ndarray, expected: np.ndarray) -> None:
    """Fails unless two caches agree in dtype, shape and every byte, NaNs included."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{actual.dtype=} {expected.dtype=}"
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    unsigned = np.dtype(f"u{actual.dtype.itemsize}")
    got = np.ascontiguousarray(actual).view(unsigned)
    want = np.ascontiguousarray(expected).view(unsigned)
    where = np.argwhere(got != want)
    if len(where):
        page, head, row, part, lane = map(int, where[0])
        slot = row * actual.shape[3] + part
        first = tuple(where[0])
        raise AssertionError(
            f"{len(where)} elements of the cache differ, in pages "
            f"{np.unique(where[:, 0])[:10].tolist()}; the first at page {page}, head "
            f"{head}, slot {slot}, lane {lane}: got {got[first]:#x}, expected "
            f"{want[first]:#x}"
        )


def assert_matches_oracle(
    out,
    kv_cache,
    arguments: tuple,
    *,
    lse=None,
    update_kv_cache: bool = True,
    probabilities_dtype: str | None = None,
    **options,
) -> oracle.Expected:
    """Fails unless an output is within budget and the cache is right in every byte.

    Args:
      out: Output of the operator, anything numpy can read.
      kv_cache: Cache that it returned.
      arguments: ``RaggedBatch.arguments``, in the state before the call.
      lse: The logarithms of the denominators, if they were asked for.
      update_kv_cache: As given to the operator.
      probabilities_dtype: As given to the operator.
      **options: Options that change the result, as given to the operator: sm_scale,
        causal, causal_block, sliding_window, attend, soft_cap, q_scale, k_scale,
        v_scale.

    Returns:
      What was expected.
    """
    expected = oracle.ragged_paged_attention(
        *arguments, update_kv_cache=update_kv_cache, **options
    )
    assert_same_bytes(kv_cache, expected.kv_cache)
    queries, _, _, _, *metadata = arguments
    emulated, emulated_lse = emulate_low_precision(
        queries,
        expected.kv_cache,
        *metadata,
        probabilities_dtype=probabilities_dtype,
        needs_no_new_tokens=options.get("attend") == "cache" and not update_kv_cache,
        **options,
    )
    out = np.asarray(out)
    narrowest = probabilities_dtype or queries.dtype
    budget = error_budget(expected, emulated, narrowest, out.dtype)
    assert_output_within_budget(out, expected, budget)
    if lse is not None:
        assert_lse_within_budget(lse, expected, emulated_lse, narrowest)
    return expected


def _relative_error(out: np.ndarray, expected: oracle.Expected) -> np.ndarray:
    """abs(error) / magnitude of the elements that have any magnitude."""
    is_live = expected.magnitude > 0
    error = abs(out.astype(np.float64) - expected.out)
    return error[is_live] / expected.magnitude[is_live]


def _rms(numbers: np.ndarray) -> float:
    return float(np.sqrt(np.mean(numbers**2))) if numbers.size else 0.0


def _unit_roundoff(dtype) -> float:
    """Largest relative error of one rounding to ``dtype``."""
    return float(ml_dtypes.finfo(dtype).eps) / 2

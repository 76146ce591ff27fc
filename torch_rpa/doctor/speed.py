"""Achieved bandwidth and FLOPs of a few steps, beside what is predicted of them."""

from __future__ import annotations

import torch

import torch_rpa
from jax_kernels import chips
from torch_rpa import devices
from torch_rpa.doctor import checks, steps, timing
from torch_rpa.doctor.checks import Check
from torch_rpa.doctor.steps import Prediction, Step
from torch_rpa.validation import Inputs

# Calls in a sample, as of so many layers: the host runs ahead of the device.
CALLS, REPEATS = 16, 7
# A time outside of the expected range by more than that says that something is wrong.
MARGIN = 1.25


def check(step: Step, device: torch.device, chip: str | None, clock: str) -> Check:
    """Times a step on an open TPU.

    Args:
        step: One of ``steps.STEPS``.
        device: Whose tensors run the kernel.
        chip: Its short name, or None if it is not known.
        clock: That it is told to hold, one of ``chips.CLOCKS``.
    """
    seconds = measure(step, device)
    return verdict(step, seconds, chip, steps.prediction(step, chip, clock))


def measure(
    step: Step, device: torch.device, *, calls: int = CALLS, repeats: int = REPEATS
) -> float:
    """Returns the seconds of one call of a step."""
    tensors = make(step, device)
    options = {"sm_scale": step.head_dim**-0.5}

    def run() -> None:
        for _ in range(calls):
            torch_rpa.ragged_paged_attention(*tensors.positional, **options)
        devices.sync(device)

    def finish() -> None:
        devices.sync(device, wait=True)

    return timing.median_seconds(run, finish, repeats=repeats) / calls


def make(step: Step, device: torch.device) -> Inputs:
    """Returns the tensors of a step on a device, with a cache of random numbers."""
    generator = torch.Generator().manual_seed(0)

    def tokens(num_heads: int) -> torch.Tensor:
        shape = step.num_tokens, num_heads, step.head_dim
        numbers = torch.randn(shape, generator=generator)
        return numbers.to(torch.bfloat16).to(device)

    kv_lens = torch.zeros(step.num_sequences, dtype=torch.int32)
    starts = torch.zeros(step.num_sequences + 1, dtype=torch.int32)
    pages = torch.randperm(step.num_pages, generator=generator, dtype=torch.int32)
    page_table = torch.zeros(
        step.num_sequences, step.pages_per_sequence, dtype=torch.int32
    )
    first_page = 0
    for row, (new_tokens, all_tokens) in enumerate(step.sequences):
        kv_lens[row] = all_tokens
        starts[row + 1 :] = starts[row] + new_tokens
        count = -(-all_tokens // step.page_size)
        page_table[row, :count] = pages[first_page : first_page + count]
        first_page += count
    decodes = sum(new == 1 for new, _ in step.sequences)
    batch = (
        kv_lens,
        page_table.flatten(),
        starts,
        torch.tensor([decodes, decodes, len(step.sequences)], dtype=torch.int32),
    )
    q, k, v = (tokens(n) for n in (step.num_heads, *2 * (step.num_kv_heads,)))
    kv_cache = _random_cache(step, generator, device)
    kv_lens, page_indices, starts, distribution = (x.to(device) for x in batch)
    devices.sync(device, wait=True)
    return Inputs(q, k, v, kv_cache, kv_lens, page_indices, starts, distribution)


def _random_cache(
    step: Step, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Returns a cache in which all pages hold the same random numbers.

    They are spread on the device: the whole cache is larger than what a host sends
    there in a moment.
    """
    dtype = getattr(torch, step.cache_dtype)
    shape = torch_rpa.kv_cache_shape(
        step.num_pages, step.page_size, step.num_kv_heads, step.head_dim, dtype=dtype
    )
    page = torch.randn(shape[1:], generator=generator).to(dtype)
    return page.to(device).expand(shape).contiguous()


def verdict(
    step: Step, seconds: float, chip: str | None, prediction: Prediction | None
) -> Check:
    """Says how fast a step is, and whether it is as fast as predicted."""
    microseconds = 1e6 * seconds
    predicted = None if prediction is None else prediction.microseconds
    bytes_per_s, flops_per_s = (
        needed / seconds for needed in (step.needed_bytes, step.needed_flops)
    )
    figures = {
        "measured_microseconds": microseconds,
        "predicted_microseconds": predicted,
        "bytes_per_s": bytes_per_s,
        "flops_per_s": flops_per_s,
    }
    name = f"speed, {step.words}"
    finding = f"measured {microseconds:.0f} us, " + (
        f"{bytes_per_s / 1e12:.2f} TB/s"
        if step.is_bound_by_memory
        else f"{flops_per_s / 1e12:.0f} TFLOP/s"
    )
    known = chips.find_chip(chip)
    if known.known_rates is not None:
        bound = step.bound_microseconds(known)
        figures["bound_microseconds"] = bound
        finding += f", {bound / microseconds:.0%} of what the chip's peaks allow"
        if bound > microseconds:
            return checks.failed(
                name, f"{finding}: it was not waited for", checks.REPORT, **figures
            )
    if prediction is None:
        return checks.ok(name, f"{finding}; no prediction for this chip", **figures)
    ratio = microseconds / prediction.microseconds
    figures["ratio_to_prediction"] = ratio
    finding += (
        f"; predicted {prediction.microseconds:.0f} us, measured is {ratio:.2f} times "
        f"that, {prediction.low} to {prediction.high} were expected"
    )
    if prediction.low / MARGIN <= ratio <= prediction.high * MARGIN:
        return checks.ok(name, finding, **figures)
    return checks.warning(
        name,
        finding,
        "see that nothing else uses the TPU or the host, then " + checks.REPORT,
        **figures,
    )

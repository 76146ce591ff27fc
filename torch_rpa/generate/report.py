"""What a run of an engine comes to: a summary, and a plot over time."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch_rpa.serving import Engine, GenerationOutput, StepRecord


def summary(engine: Engine, outputs: Sequence[GenerationOutput], device: str) -> str:
    """Returns a table of what the engine did, one figure on each line."""
    stats, scheduler = engine.stats, engine.scheduler
    prompt_tokens = sum(len(output.prompt_ids) for output in outputs)
    firsts = [o.timestamps[0] - o.created_time for o in outputs if o.timestamps]
    lines = [
        ("device", device),
        ("requests", f"{len(outputs)}"),
        ("steps", f"{stats.num_steps}"),
        ("prompt tokens", f"{prompt_tokens}"),
        ("  from prefix cache", f"{stats.num_shared_tokens}"),
        ("generated tokens", f"{stats.num_generated}"),
        ("tokens per second", f"{stats.tokens_per_second:.1f}"),
        ("  compiled steps only", f"{stats.compiled_tokens_per_second:.1f}"),
        ("sequences per step", f"{stats.mean_sequences:.1f}"),
        ("  at most", f"{scheduler.max_num_sequences}"),
        ("padding", f"{stats.padding_share:.1%}"),
        ("most pages in use", f"{stats.peak_pages_held}"),
        ("  of", f"{scheduler.allocator.num_pages}"),
        ("preemptions", f"{stats.num_preemptions}"),
        ("compilations", f"{stats.num_compilations}"),
        ("  at most", f"{stats.max_compilations}"),
    ]
    if firsts:
        lines += [
            ("seconds to first token", f"{statistics.median(firsts):.3f}"),
            ("  slowest", f"{max(firsts):.3f}"),
        ]
    return "\n".join(f"{name:24}{value}" for name, value in lines)


def logprobs(output: GenerationOutput) -> str:
    """Returns a line for each generated token: how likely it was, and what else was.

    Args:
        output: Of a request that asked for log probabilities.
    """
    lines = ["logprob  rank  token: most likely"]
    found = zip(output.generated_tokens, output.logprobs or (), strict=False)
    for token, entries in found:
        chosen = entries[token]
        likely = sorted(entries.values(), key=lambda entry: entry.rank)
        there = ", ".join(f"{e.decoded_token!r} {e.logprob:.3f}" for e in likely)
        token_text = repr(chosen.decoded_token)
        lines.append(f"{chosen.logprob:7.3f}  {chosen.rank:4}  {token_text}: {there}")
    return "\n".join(lines)


def require_matplotlib() -> None:
    """Raises a ValueError that says what to install where plots cannot be made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib: pip install matplotlib, or the extra [plot] of "
            "this package"
        ) from error


def check_plot_path(path: Path) -> None:
    """Raises a ValueError if a plot could not be written there."""
    require_matplotlib()
    from matplotlib.figure import Figure

    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in kinds:
        raise ValueError(f"--plot must end in one of .{', .'.join(kinds)}, got {path}")
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--plot must be a file in a folder to write to, got {path}")


def plot(steps: Iterable[StepRecord], num_pages: int, path: Path) -> None:
    """Draws rows, tokens and pages of each step over time.

    Args:
        steps: At least one.
        num_pages: Pages in the cache.
        path: Where to write; the suffix says in which format.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = list(steps)
    times = [step.start - steps[0].start for step in steps]
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    rows, tokens, pages = figure.subplots(3, 1, sharex=True)
    decodes = [step.num_decodes for step in steps]
    prefills = [step.num_sequences - step.num_decodes for step in steps]
    rows.stackplot(times, decodes, prefills, labels=["decode", "prefill"], step="post")
    waiting = [step.num_waiting for step in steps]
    rows.step(times, waiting, "k:", where="post", label="waiting")
    rows.set_ylabel("sequences")
    computed = [step.num_tokens for step in steps]
    padding = [step.num_padded_tokens - step.num_tokens for step in steps]
    tokens.stackplot(
        times, computed, padding, labels=["computed", "padding"], step="post"
    )
    tokens.set_ylabel("tokens per step")
    held = [step.num_pages_held for step in steps]
    pages.step(times, held, where="post", label="in use")
    pages.axhline(num_pages, color="k", linestyle="--", label="all")
    pages.set_ylim(bottom=0)
    pages.set_ylabel("pages")
    pages.set_xlabel("seconds")
    for axes in (rows, tokens, pages):
        axes.legend(loc="upper right")
    figure.savefig(path)

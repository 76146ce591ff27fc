"""Roofline and scaling of predictions as a picture. Needs matplotlib."""

from __future__ import annotations

import importlib.util
import itertools

from benchmarks.prediction import Prediction
from jax_kernels.chips import Chip


def require_matplotlib() -> None:
    """Raises SystemExit, with the remedy, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")


def write(
    path: str,
    chip: Chip,
    predictions: list[Prediction],
    curves: list[list[Prediction]],
) -> None:
    """Writes a PNG.

    Args:
      path: Of the file.
      chip: Whose peaks are the roof.
      predictions: Points under the roof.
      curves: Over context and over the number of sequences, as ``scaled_cases`` says.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(
        1, 1 + len(curves), figsize=(6 * (1 + len(curves)), 4.5)
    )
    axes = axes if curves else [axes]
    _roofline(axes[0], chip, predictions)
    readings = (("context", _context), ("sequences", _batch))
    for axis, curve, (label, reading) in zip(axes[1:], curves, readings, strict=False):
        _scaling(axis, curve, label, [reading(point) for point in curve])
    figure.suptitle(f"Predicted for {chip.name} from compiled schedules, not measured")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _context(prediction: Prediction) -> int:
    return prediction.case.sequences[0].kv_len


def _batch(prediction: Prediction) -> int:
    return len(prediction.case.sequences)


def _roofline(axis, chip: Chip, predictions: list[Prediction]) -> None:
    rates = chip.rates
    knee = rates.bf16_flops_per_s / rates.hbm_bytes_per_s
    intensities = [p.case.ideal.flops / p.case.ideal.bytes for p in predictions]
    edges = [min([*intensities, knee]) / 4, knee, max([*intensities, knee]) * 4]
    roof = [
        min(x * rates.hbm_bytes_per_s, rates.bf16_flops_per_s) / 1e12 for x in edges
    ]
    axis.loglog(edges, roof, color="black", label=f"{chip.name} peaks")
    caps = {p.case.shape.model.head_dim: p.cap for p in predictions if p.cap < 1}
    for head_dim, cap in caps.items():
        height = cap * rates.bf16_flops_per_s / 1e12
        ends = (cap * knee, edges[-1])
        label = f"most at D = {head_dim}"
        axis.loglog(ends, (height, height), ":", color="black", label=label)
    markers = itertools.cycle("osv^<>DpPX*")
    for prediction, intensity in zip(predictions, intensities, strict=True):
        rate = prediction.case.ideal.flops / prediction.result.seconds / 1e12
        axis.loglog([intensity], [rate], next(markers), label=prediction.case.name)
    axis.set_xlabel("needed FLOPs per needed byte")
    axis.set_ylabel("TFLOP/s")
    axis.legend(fontsize=5, ncols=2)


def _scaling(axis, curve: list[Prediction], label: str, sizes: list[int]) -> None:
    times = [point.result.microseconds for point in curve]
    bounds = [point.shares["ideal_microseconds"] for point in curve]
    axis.loglog(sizes, times, "o-", label="predicted")
    axis.loglog(sizes, bounds, "--", color="black", label="bound of the chip")
    axis.set_xlabel(label)
    axis.set_ylabel("us")
    axis.legend()


def write_ratios(
    path: str,
    steps: list[str],
    ratios: dict[str, list[float | None]],
    title: str,
) -> None:
    """Writes a PNG with a group of bars for each step, one bar for each kernel.

    Args:
      path: Of the file.
      steps: Names.
      ratios: Of each kernel one for each step, None where there is none. 1 is drawn as
        a line.
      title: Of the picture.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("agg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axis = pyplot.subplots(figsize=(9, 0.6 + 0.6 * len(steps)))
    height = 0.8 / len(ratios)
    for number, (kernel, values) in enumerate(ratios.items()):
        known = [(row, value) for row, value in enumerate(values) if value is not None]
        places = [row + (number + 0.5) * height - 0.4 for row, _ in known]
        bars = axis.barh(places, [value for _, value in known], height, label=kernel)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(steps)), steps)
    axis.invert_yaxis()
    axis.set_xlabel("time by ours: above 1, ours is faster")
    axis.set_title(title)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""Scales of keys and values that a checkpoint in 8 bits brings.

Tools that quantise models store them beside the weights, by layer, under names of their
own. transformers keeps them only where the tool's own package makes room for them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from torch_rpa.layer_scales import LayerScales, scale_numbers, stacked
from torch_rpa.scales import KVScales

Source: TypeAlias = nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]

# What follows the name of an attention module: the last part names the tool.
_KEYS_OR_VALUES = r"(?P<which>[kv])"
_ENDS = (
    _KEYS_OR_VALUES + r"_scale",  # compressed-tensors
    _KEYS_OR_VALUES + r"_proj\.(?P=which)_scale",  # ModelOpt
    _KEYS_OR_VALUES + r"_proj\.output_scale",  # Quark, compressed-tensors before 0.13
    _KEYS_OR_VALUES + r"_proj\.output_quantizer\.scale",  # Quark, in a model
    r"(?P<which>kv)_scale",  # AutoFP8
)
_NAMES = tuple(
    re.compile(rf"(?P<prefix>.*\.)?(?P<layer>\d+)\.\w*att\w*\.{end}") for end in _ENDS
)

_MOST_NAMED = 8  # layers in a message: the name of a tensor may say any number


class _Place(NamedTuple):
    prefix: str
    layer: int
    which: str


class _Tensors(NamedTuple):
    """Named tensors that are read when they are asked for."""

    names: list[str]
    read: Callable[[str], torch.Tensor]


def read_kv_scales(source: Source) -> KVScales:
    """Reads the scales of keys and values that a checkpoint in 8 bits brings.

    They are those of compressed-tensors (``self_attn.k_scale``), ModelOpt
    (``self_attn.k_proj.k_scale``), Quark (``self_attn.k_proj.output_scale``) and
    AutoFP8 (``self_attn.kv_scale``), one for each layer or each key head. The cache
    must have the dtype that they were made for, mostly ``torch.float8_e4m3fn``.

    Args:
        source: A folder with ``*.safetensors``, such a file, a mapping of names to
            tensors, or a model. Of a model from ``from_pretrained`` transformers may
            have dropped the scales, as names that the model does not have.

    Returns:
        ``(k_scale, v_scale)``, float32 on the CPU.

    Raises:
        ValueError: There are no scales, not those of all layers, or two that differ for
            one layer; or a file is damaged.
        NotImplementedError: They have zero points, or are neither of layers nor heads.
    """
    tensors = _open(source)
    places: dict[_Place, torch.Tensor] = {}
    for name in tensors.names:
        place = _place(name)
        if place is not None:
            _refuse_zero_point(tensors, name)
            scale = _scale(name, tensors.read(name))
            for which in place.which:
                known = places.setdefault(place._replace(which=which), scale)
                if not torch.equal(known, scale):
                    raise ValueError(
                        "source must have one scale of the keys and one of the values "
                        f"of each layer, got {name} = {scale.tolist()} beside "
                        f"{known.tolist()}"
                    )
    prefixes = sorted({place.prefix for place in places})
    if len(prefixes) != 1:
        found = f"those of {prefixes}" if prefixes else f"none in {_say(source)}"
        raise ValueError(
            "source must have scales of keys and values of the layers of one model, "
            f"got {found}"
        )
    return KVScales(*(_of_layers(places, prefixes[0], which) for which in "kv"))


def brings_kv_scales(model: nn.Module) -> bool:
    """Whether a model has such scales among its parameters or buffers."""
    return any(_place(name) is not None for name in _open(model).names)


def _place(name: str) -> _Place | None:
    for pattern in _NAMES:
        match = pattern.fullmatch(name)
        if match:
            return _Place(match["prefix"] or "", int(match["layer"]), match["which"])
    return None


def _of_layers(
    places: Mapping[_Place, torch.Tensor], prefix: str, which: str
) -> LayerScales:
    layers = range(max(place.layer for place in places) + 1)
    lacking = (i for i in layers if _Place(prefix, i, which) not in places)
    missing = [*itertools.islice(lacking, _MOST_NAMED)]
    if missing:
        more = " and maybe others" if len(missing) == _MOST_NAMED else ""
        raise ValueError(
            f"source must have {which}_scale of all {len(layers)} layers of {prefix}, "
            f"got none of {missing}{more}"
        )
    scales = stacked([places[_Place(prefix, i, which)] for i in layers])
    scale_numbers(f"{which}_scale", scales)
    return scales


def _scale(name: str, scale: Any) -> torch.Tensor:
    """Returns float32 ``[]`` or ``[Hkv]``."""
    if not isinstance(scale, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {scale!r}")
    sizes = [size for size in scale.shape if size != 1]
    is_one_for_each_head = len(sizes) == 1 and (scale.dim() == 1 or scale.dim() == 3)
    if sizes and not is_one_for_each_head:
        raise NotImplementedError(
            f"{name} must have one number, or one for each key head, got shape "
            f"{list(scale.shape)}: measure scales with torch_rpa.measure_kv_scales"
        )
    return scale.detach().float().cpu().reshape(sizes)


def _refuse_zero_point(tensors: _Tensors, name: str) -> None:
    zero_point = f"{name.removesuffix('scale')}zero_point"
    if zero_point in tensors.names and tensors.read(zero_point).any():
        raise NotImplementedError(
            f"{zero_point} must be 0, since the cache stores what is divided by scales "
            "alone: measure scales with torch_rpa.measure_kv_scales"
        )


def _open(source: Any) -> _Tensors:
    if isinstance(source, nn.Module):
        # Under torch_xla too, parameters have the names of the modules.
        source = dict([*source.named_parameters(), *source.named_buffers()])
    if isinstance(source, Mapping):
        return _Tensors([*source], source.__getitem__)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            "source must be a folder or a file of safetensors, a mapping or a model, "
            f"got {source!r}"
        )
    files: dict[str, list[Path]] = {}
    for name, path in _names_in_files(Path(source)):
        files.setdefault(name, []).append(path)

    def read(name: str) -> torch.Tensor:
        first, *others = (_tensor_of(path, name) for path in files[name])
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"source must have one {name}, got different ones in "
                f"{' and '.join(path.name for path in files[name])}: give one file"
            )
        return first

    return _Tensors([*files], read)


def _tensor_of(file: Path, name: str) -> torch.Tensor:
    with _opened(file) as opened:
        return opened.get_tensor(name)


def _names_in_files(path: Path) -> Iterator[tuple[str, Path]]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        if not file.is_file() or file.suffix != ".safetensors":
            raise ValueError(
                "source must be a folder or a file of safetensors, a mapping or a "
                f"model, got {str(path)!r}"
            )
        with _opened(file) as opened:
            names = [*opened.keys()]
        for name in names:
            yield name, file


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens a file of safetensors; raises a ValueError if it is none, or is cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file}: expected safetensors, got {error}") from None


def _say(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | os.PathLike) else "its names"

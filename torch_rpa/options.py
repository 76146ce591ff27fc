"""The parameters of the operator that are not tensors, for PyTorch.

They are listed in :class:`jax_kernels.contract.AttentionOptions`, with the rules of
their values. Here are only the schema made from that list, and dtypes of PyTorch.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

import torch

from jax_kernels.contract import AttentionOptions as AttentionOptions
from jax_kernels.contract.arguments import OPTIONS_AS_ARRAYS
from jax_kernels.contract.options import check_block_sizes

# Nullable, whatever the default is: the dispatcher makes None of a plain ``bool`` False
# before anybody sees it, but here None comes through and is refused.
_SCHEMA_TYPES = {bool: "bool?", int: "int?", float: "float?", str: "ScalarType?"}
# What an operator returns is a part of its name.
_NOT_IN_SCHEMAS = ("return_lse",)


def _schema() -> str:
    hints = typing.get_type_hints(AttentionOptions)
    parts = []
    for field in dataclasses.fields(AttentionOptions):
        if field.name in _NOT_IN_SCHEMAS:
            continue
        if typing.get_origin(hints[field.name]) is typing.Literal:
            parts.append(f"str {field.name}='{field.default}'")
            continue
        kinds = {*typing.get_args(hints[field.name])} or {hints[field.name]}
        (kind,) = kinds - {types.NoneType}
        parts.append(f"{_SCHEMA_TYPES[kind]} {field.name}={field.default}")
    return ", ".join(parts)


# How the kernel computes comes after what it means.
OPTIONS_SCHEMA = f"{_schema()}, int[]? block_sizes=None"


def split_tensors(
    keywords: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the options that are tensors, and the keywords without them.

    The tensors are by the names that they have in the operators' schemas, and may have
    those in the keywords as well.

    Raises:
        ValueError: One of them is given by both names.
    """
    tensors, rest = {}, keywords
    for name, option in OPTIONS_AS_ARRAYS.items():
        for given in (name, option):
            if isinstance(keywords.get(given), torch.Tensor):
                if name in tensors:
                    raise ValueError(
                        f"{option} must be given once, got tensors as {option} and "
                        f"as {name}"
                    )
                tensors[name] = keywords[given]
                rest = {other: x for other, x in rest.items() if other != given}
    return tensors, rest


def make_options(keywords: dict[str, Any]) -> AttentionOptions:
    """Returns checked options.

    Args:
        keywords: As the operator takes them, dtypes as ``torch.dtype``. Those
            that are left out have their defaults. ``block_sizes`` is checked, and is no
            part of what comes back.

    Raises:
        ValueError: A value breaks its rule.
        NotImplementedError: A dtype that is not supported.
    """
    try:
        return _known_options(tuple(keywords), *keywords.values())
    except TypeError:  # a value without a hash, such as a list
        return _checked_options(keywords)


# By type as well: True is equal to 1.0, and is no factor.
@functools.lru_cache(maxsize=1024, typed=True)
def _known_options(names: tuple[str, ...], *values: Any) -> AttentionOptions:
    """Options that were checked before: every call of a model asks for the same few."""
    return _checked_options(dict(zip(names, values, strict=True)))


def _checked_options(keywords: dict[str, Any]) -> AttentionOptions:
    keywords = dict(keywords)
    check_block_sizes(keywords.pop("block_sizes", None))
    for name in ("probabilities_dtype", "out_dtype"):
        dtype = keywords.get(name)
        if dtype is None:
            continue
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} must be a torch.dtype or None, got {dtype!r}")
        keywords[name] = dtype_name(dtype)
    return AttentionOptions(**keywords)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name by which the contract knows a dtype."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Returns the dtype of a name."""
    return getattr(torch, name)

"""The tensors of one step, padded to static shapes, built on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_rpa.scheduling import Row
from torch_rpa.transformers.context import RaggedBatch


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """The static sizes of all steps; on an XLA device each bucket is one program.

    Attributes:
        token_buckets: Ascending sizes that T may have; if empty, any.
        num_sequences: S.
        pages_per_sequence: P.
    """

    token_buckets: tuple[int, ...]
    num_sequences: int
    pages_per_sequence: int

    def bucket(self, num_tokens: int) -> int:
        """Returns the smallest bucket that holds so many tokens; ValueError if none."""
        if not self.token_buckets:
            return num_tokens
        for size in self.token_buckets:
            if num_tokens <= size:
                return size
        raise ValueError(
            f"num_tokens must be at most {self.token_buckets[-1]}, got {num_tokens}"
        )


class StepInputs(NamedTuple):
    """What a model call takes, all of static shape."""

    input_ids: torch.Tensor  # i64[1, T]
    pending_rows: torch.Tensor  # i64[1, T] which row of the last step has the id, or -1
    position_ids: torch.Tensor  # i64[1, T]
    last_tokens: torch.Tensor  # i64[S] where in T each sequence ends
    batch: RaggedBatch

    def to(self, device: torch.device | str) -> StepInputs:
        """Moves every tensor to a device."""
        batch = RaggedBatch(*(tensor.to(device) for tensor in self.batch))
        return StepInputs(
            self.input_ids.to(device),
            self.pending_rows.to(device),
            self.position_ids.to(device),
            self.last_tokens.to(device),
            batch,
        )


def build_step_inputs(
    rows: Sequence[Row],
    shapes: StepShapes,
    size: int | None = None,
    *,
    longest: int = 0,
) -> StepInputs:
    """Lays the rows end to end and pads, to a bucket or to ``size`` tokens.

    With ``longest`` the model finds a position of a sequence of so many tokens: that of
    the padding, if the rows do not reach it. Nothing but that is changed by it.

    Two rows, of one token (with 4 cached) and of three (new), T = 8, S = 3; the one
    token is not known yet, row 1 of the step before generates it::

        input_ids     0  a  b  c  0  0  0  0
        pending_rows  1 -1 -1 -1 -1 -1 -1 -1
        position_ids  4  0  1  2  0  0  0  0
        cu_q_lens     0  1  4  4
        kv_lens       5  3  0
        last_tokens   0  3  0
        distribution  1  1  2
    """
    tokens: list[int] = []
    is_beyond = longest > max((row.end for row in rows), default=0)
    if size is None:
        size = shapes.bucket(sum(row.num_tokens for row in rows) + is_beyond)
    pending_rows = [-1] * size
    positions: list[int] = []
    kv_lens: list[int] = []
    cu_q_lens = [0]
    page_table: list[int] = []
    num_decodes = 0
    for row in rows:
        request = row.request
        tokens += request.tokens[row.start : row.end]
        if row.pending_row is not None:
            pending_rows[len(tokens)] = row.pending_row
            tokens.append(0)
        positions += range(row.start, row.end)
        kv_lens.append(row.end)
        cu_q_lens.append(len(tokens))
        page_table += _padded(request.page_table(), shapes.pages_per_sequence)
        if row.num_tokens == 1 and num_decodes == len(kv_lens) - 1:
            num_decodes += 1
    num_seqs = shapes.num_sequences
    last_tokens = [start - 1 for start in cu_q_lens[1:]]
    cu_q_lens += [len(tokens)] * (num_seqs - len(rows))
    return StepInputs(
        torch.tensor([_padded(tokens, size)]),
        torch.tensor([pending_rows]),
        torch.tensor([_padded(positions, size, longest - 1 if is_beyond else 0)]),
        torch.tensor(_padded(last_tokens, num_seqs)),
        RaggedBatch(
            _int32(_padded(kv_lens, num_seqs)),
            _int32(_padded(page_table, num_seqs * shapes.pages_per_sequence)),
            _int32(cu_q_lens),
            _int32([num_decodes, num_decodes, len(rows)]),
        ),
    )


def _padded(values: Sequence[int], size: int, padding: int = 0) -> list[int]:
    if len(values) > size:
        raise ValueError(f"at most {size} values fit, got {len(values)}")
    return [*values, *[padding] * (size - len(values))]


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)

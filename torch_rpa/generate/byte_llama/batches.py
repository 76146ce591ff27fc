"""Documents as tokens: random rows to train on, and every byte once to evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from torch_rpa.generate.byte_llama.corpus import Document
from torch_rpa.generate.tokenizer import ByteTokenizer

BOS, EOS = ByteTokenizer.bos_token_id, ByteTokenizer.eos_token_id
NEWLINE = ord("\n")
# What cross_entropy leaves out.
IGNORED = -100


class TrainingRows:
    """Random rows of a corpus, all starting where a line starts.

    A prompt is the begin token and a line, so a row is one as well: it begins with the
    begin token, in place of the line break before it. The documents lie end to end.

    Args:
        documents: What to train on.
        length: Tokens that a row predicts.
    """

    def __init__(self, documents: Iterable[Document], length: int):
        encode = ByteTokenizer().encode
        self.tokens = torch.tensor(
            [token for _, text in documents for token in (*encode(text), EOS)],
            dtype=torch.int16,
        )
        self.length = length
        starts = (self.tokens == BOS) | (self.tokens == NEWLINE)
        starts[:-1] &= self.tokens[1:] != NEWLINE  # a blank line starts no text
        starts = starts[: -length or None]
        self.starts = starts.nonzero().flatten()
        if not len(self.starts):
            raise ValueError(
                f"documents must hold more than the {length} tokens of a row, got "
                f"{len(self.tokens)}"
            )

    def sample(self, count: int, seed: int) -> torch.Tensor:
        """Returns ``i64[count, length + 1]``, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(self.starts), (count, 1), generator=generator)
        rows = self.tokens[self.starts[chosen] + torch.arange(self.length + 1)].long()
        rows[:, 0] = BOS
        return rows


def evaluation_batches(
    documents: Iterable[Document], length: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields inputs and targets, ``i64[rows, length]``, that hold every byte once.

    A document is cut into pieces of ``length`` tokens, its end token included. Each
    piece is predicted from the begin token and the bytes before in the same piece.
    """
    pieces = [
        tokens[start : start + length]
        for _, text in documents
        for tokens in [[*text.encode("utf-8"), EOS]]
        for start in range(0, len(tokens), length)
    ]
    for first in range(0, len(pieces), rows):
        batch = pieces[first : first + rows]
        inputs = [[BOS, *piece[:-1]] for piece in batch]
        yield _padded(inputs, length, EOS), _padded(batch, length, IGNORED)


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

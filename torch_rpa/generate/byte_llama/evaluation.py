"""How well a model of bytes predicts text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from torch_rpa.generate.byte_llama.batches import IGNORED, evaluation_batches
from torch_rpa.generate.byte_llama.corpus import Document


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    documents: Sequence[Document],
    *,
    context: int,
    rows: int = 8,
) -> float:
    """Returns the bits that the model needs for a byte; 8 is no model at all.

    Args:
        model: Over the tokens of ``ByteTokenizer``, on the CPU, in evaluation mode.
        documents: Text that it was not trained on.
        context: Most bytes that it sees before the one to predict, plus one.
        rows: How many pieces of text to predict at once.
    """
    nats, num_bytes = 0.0, 0
    for inputs, targets in evaluation_batches(documents, context, rows):
        nats += cross_entropy(model, inputs, targets, reduction="sum").item()
        num_bytes += int((targets != IGNORED).sum())
    # Each document has one end token, whose bits count and which is no byte.
    return nats / math.log(2) / (num_bytes - len(documents))


def cross_entropy(
    model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor, reduction: str
) -> torch.Tensor:
    """Returns the model's loss in nats.

    Inputs and targets are ``i64[rows, length]``.
    """
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
    )

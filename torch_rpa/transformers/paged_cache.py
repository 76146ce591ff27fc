"""What transformers takes for a cache of its own in a block of paged generation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from torch_rpa.transformers.lockstep import LockstepBatch
from torch_rpa.transformers.paging_options import PagingOptions
from torch_rpa.transformers.rotary import length_scaling, refuse_other_factors


def _refusing(method: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{method} of a PagedCache: it only serves greedy search and sampling with "
            'attn_implementation="rpa", in the block of paged_generation that made it'
        )

    return refuse


class _PagedLayer(CacheLayerMixin):
    """What a layer of a paged cache can say: its length."""

    is_sliding = False

    def __init__(self, cache: PagedCache):
        super().__init__()
        self._cache = weakref.ref(cache)

    def get_seq_length(self) -> int:
        cache = self._cache()
        return 0 if cache is None else cache.num_columns

    def get_max_length(self) -> int:
        cache = self._cache()
        return 0 if cache is None else cache.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.20
    batch_repeat_interleave = _refusing("batch_repeat_interleave")
    batch_select_indices = _refusing("batch_select_indices")
    get_mask_sizes = _refusing("get_mask_sizes")
    lazy_initialization = _refusing("lazy_initialization")
    reorder_cache = _refusing("reorder_cache")
    reset = _refusing("reset")
    update = _refusing("update")


class PagedCache(Cache):
    """What transformers takes for the cache of a padded batch.

    It knows which columns of the batch it has seen, and which of them are tokens. Keys
    and values lie in paged caches without padding.

    Attributes:
        capacity: Columns that there is room for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        options: PagingOptions,
        *,
        compiles: bool = True,
        caches_of_block: weakref.WeakSet[PagedCache] | None = None,
    ):
        num_layers = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[_PagedLayer(self) for _ in range(num_layers)])
        self.capacity = capacity
        self._model = model
        self._options = options
        self._compiles = compiles
        self._ids: torch.Tensor | None = None  # i64[B, columns seen]
        self._is_token: torch.Tensor | None = None  # bool[B, columns seen]
        self._batch: LockstepBatch | None = None
        self._is_closed = False
        # Which the end of the block closes; copies are among them.
        self._caches_of_block = caches_of_block
        if caches_of_block is not None:
            caches_of_block.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A cache that has seen the same; its keys and values are computed again."""
        copied = type(self)(
            self._model,
            self.capacity,
            self._options,
            compiles=self._compiles,
            caches_of_block=self._caches_of_block,
        )
        copied._ids, copied._is_token = self._ids, self._is_token
        copied._is_closed = self._is_closed
        memo[id(self)] = copied
        return copied

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns.

        Args:
            tokens_to_remove: So many, as a negative number. A positive one is how many
                columns to keep, as in transformers before 5.20.
        """
        keep = tokens_to_remove + (self.num_columns if tokens_to_remove <= 0 else 0)
        if keep < 0:
            raise ValueError(
                f"tokens_to_remove must be at least {-self.num_columns}, got "
                f"{tokens_to_remove}"
            )
        if self._ids is not None and self._is_token is not None:
            self._ids = self._ids[:, :keep]
            self._is_token = self._is_token[:, :keep]

    @property
    def num_columns(self) -> int:
        """Columns of the padded batch seen so far."""
        return 0 if self._is_token is None else self._is_token.shape[1]

    def require_room(self, num_columns: int) -> None:
        """Raises unless so many columns fit."""
        if num_columns > self.capacity:
            raise ValueError(
                f"past_key_values has room for {self.capacity} tokens of each sequence,"
                f" got {num_columns}: raise max_length of paged_generation"
            )

    def close(self) -> None:
        """Frees keys and values; what comes later raises."""
        self._batch, self._is_closed = None, True

    def next_logits(
        self,
        ids: torch.Tensor,  # i64[B, n], the new columns
        mask: torch.Tensor | None,  # [B, columns seen + n]
        positions: torch.Tensor | None,  # i64[B or 1, n]
    ) -> torch.Tensor:
        """Takes up new columns; returns what may follow the last token of each row.

        Returns:
            float32 ``[B, vocabulary]`` on the CPU.
        """
        if self._is_closed:
            raise ValueError(
                "past_key_values must not be used after an error or after the block of "
                "paged_generation that made it"
            )
        is_token = self._checked_mask(ids, mask)
        self._check_positions(is_token, positions)
        if self._batch is None and self.num_columns:  # in a copy
            refuse_other_factors(
                length_scaling(self._model), int(is_token.sum(dim=1).max())
            )
        columns = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        rows = zip(columns, is_token, strict=True)
        texts = [row[keep].tolist() for row, keep in rows]
        try:
            if self._batch is None:
                self._batch = LockstepBatch(
                    self._model,
                    texts,
                    max_new_tokens=self.capacity - max(map(len, texts)),
                    page_size=self._options.page_size,
                    num_pages=self._options.num_pages,
                    max_tokens_per_step=self._options.max_tokens_per_step,
                    cache_dtype=self._options.cache_dtype,
                    k_scale=self._options.k_scale,
                    v_scale=self._options.v_scale,
                    prefix_caching=True,  # later turns
                    compiles=self._compiles,
                )
            else:
                self._batch.read(texts)
            logits = self._batch.next_logits()
        except BaseException:
            self.close()  # a part of the step may be done
            raise
        self._ids, self._is_token = columns, is_token
        return logits

    def _checked_mask(
        self, ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns which columns are tokens, those seen and the new ones."""
        num_rows = len(ids) if self._is_token is None else len(self._is_token)
        shape = (num_rows, self.num_columns + ids.shape[1])
        if len(ids) != num_rows or not ids.shape[1]:
            raise ValueError(
                f"input_ids must have new columns for the {num_rows} sequences in "
                f"past_key_values, got shape {list(ids.shape)}"
            )
        self.require_room(shape[1])
        if mask is not None and mask.shape != shape:
            raise ValueError(
                f"attention_mask must have the shape {list(shape)} of the tokens in "
                f"past_key_values and input_ids, got {list(mask.shape)}"
            )
        is_token = torch.ones(shape).bool() if mask is None else mask.cpu() != 0
        if not is_token.any(dim=1).all():
            raise ValueError(
                "attention_mask must leave at least one token in each row, got "
                f"{is_token.sum(dim=1).tolist()}"
            )
        if self._is_token is not None:
            self._check_seen(is_token[:, : self.num_columns], self._is_token, mask)
        return is_token

    def _check_seen(
        self,
        is_token: torch.Tensor,  # bool[B, columns seen]
        seen: torch.Tensor,  # bool[B, columns seen]
        mask: torch.Tensor | None,
    ) -> None:
        """Raises unless the mask hides what it did, and at most the end of rows more.

        That end is what was padding to the caller, after the text of a row had ended.
        """
        if (is_token & ~seen).any():
            raise ValueError(
                "attention_mask must hide the padding that past_key_values was made "
                f"with, got {'None' if mask is None else 'another padding'}"
            )
        is_after_hidden = (seen & ~is_token).long().cumsum(dim=1) > 0
        if (is_token & is_after_hidden).any():
            raise NotImplementedError(
                "attention_mask may hide tokens that past_key_values has seen at the "
                "end of a row alone, got some before others, which have attended to "
                "them; pass the whole text without past_key_values"
            )

    def _check_positions(
        self, is_token: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        if positions is None:
            return
        counted = is_token.long().cumsum(dim=1)[:, self.num_columns :] - 1
        compared = is_token[:, self.num_columns :]
        # Phi-3 of transformers 4.57 gives those of all tokens, where it would compute
        # the cache again.
        positions = positions[..., -counted.shape[1] :]
        if self.num_columns:
            # After padding on the right transformers counts on in one way or another.
            has_gap = (is_token[:, :-1] & ~is_token[:, 1:]).any(dim=1, keepdim=True)
            compared = compared & ~has_gap
        if ((positions.cpu() != counted) & compared).any():
            raise NotImplementedError(
                "position_ids must count the tokens of each sequence from 0, got "
                f"{positions.tolist()}; leave them out"
            )

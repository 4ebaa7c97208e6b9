"""Attention over packed sequences for transformers models.

A pack is one row `[1, S]` that holds several sequences one after the other, without padding. The
model is called with `layout=PackLayout.of(lengths, device)`, which transformers hands to the
attention function of every layer. There is no mask: the kernels get the sequences apart, so
attention cannot leave one.

* fp16 and bf16 on CUDA: one call of a flash kernel that reads the packed rows as they are.
* All else: `scaled_dot_product_attention` on buckets. A bucket holds sequences of similar length,
  padded on the right. Padded keys come after every real query, so causal attention needs no mask.

With a sliding window of `w` keys, a longer sequence is cut into blocks of `w` tokens. The first
block is plain causal attention. A later block sees itself and the block before it. The cost is
O(T w).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from rlhf.training.cpu_bfloat16 import computed_wide

ATTENTION = "groupwise_packed"

# Padding slots that cost as much as one more kernel call. Between 16 and 64 the time of a layer
# changes little, for a hidden width of 128 and for one of 576.
_SLOTS_PER_CALL = 32

# On a CPU a call of width 40 takes a sixth less time than one of width 39.
_WIDTH_MULTIPLE = 4

# Arguments that change what attention computes, and that no kernel here knows.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "indices", "block_indices")


@dataclass(frozen=True, slots=True, eq=False)
class PackLayout:
    """Start of each sequence of a pack; built once per micro-batch, used by every layer."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # int32 [B+1], on the device of the pack
    # By window: full and sliding layers of one model cut the pack differently.
    _plans: dict[int | None, _Plan] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> PackLayout:
        """Layout of sequences that have these lengths, in the order of the pack."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"a pack holds sequences of one token or more, not {list(lengths)}")
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return PackLayout(tuple(lengths), bounds.to(device, torch.int32))

    @property
    def tokens(self) -> int:
        """Number of tokens of the pack."""
        return sum(self.lengths)

    def _plan(self, window: int | None) -> _Plan:
        # A window that no sequence exceeds cuts nothing: those layers share the plan of full ones.
        window = window if window is not None and window < max(self.lengths) else None
        if window not in self._plans:
            self._plans[window] = _Plan.of(self.lengths, window, self.cu_seqlens.device)
        return self._plans[window]


def register() -> None:
    """Make `ATTENTION` a valid `attn_implementation` of transformers. Safe to call again."""
    from transformers import AttentionInterface

    # Only the function, no mask builder: transformers then builds no mask for this name.
    AttentionInterface.register(ATTENTION, packed_attention)


def padding_slots(lengths: Sequence[int]) -> int:
    """Number of slots that a layer with full attention computes beyond the tokens of a pack."""
    buckets = _buckets(_Piece(0, length) for length in lengths)
    return sum(len(bucket.pieces) * bucket.width for bucket in buckets) - sum(lengths)


def packed_attention(  # noqa: PLR0913 - the interface of transformers
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: PackLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack, as an attention function of transformers.

    `query` [1, Hq, S, D], `key` and `value` [1, Hkv, S, D]. Query i sees key j of its own sequence
    if `i - sliding_window < j <= i`. Returns [1, S, Hq, D] and no weights.
    """
    layout = _checked_layout(layout, query, key)
    _refuse_unsupported(module, attention_mask, dropout, others)
    # [S, H, D] is how the projections of a model lay their outputs out: no copy.
    query = query.squeeze(0).transpose(0, 1)
    key = key.squeeze(0).transpose(0, 1)
    value = value.squeeze(0).transpose(0, 1)
    attend = _flash if _has_flash(query) else _by_bucket
    return attend(query, key, value, layout, scaling, sliding_window)[None], None


def _checked_layout(layout: PackLayout | None, query: Tensor, key: Tensor) -> PackLayout:
    if layout is None:
        raise ValueError(
            f"attn_implementation = {ATTENTION}: the model must be called with "
            "layout=PackLayout.of(lengths, device). Nothing else says where one sequence ends. "
            "Pass it, or load the model with sdpa."
        )
    rows, _, tokens, _ = query.shape
    if rows != 1 or tokens != layout.tokens or key.shape[2] != tokens:
        raise ValueError(
            f"attn_implementation = {ATTENTION}: queries {tuple(query.shape)} and keys "
            f"{tuple(key.shape)} must be one row of the layout's {layout.tokens} tokens. "
            "Pack the batch, and call the model with use_cache=False."
        )
    return layout


def _refuse_unsupported(
    module: torch.nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    problems = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if attention_mask is not None:
        problems.append("attention_mask")
    if dropout:
        problems.append("dropout")
    is_causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        problems.append("is_causal=False")
    if problems:
        raise ValueError(
            f"attn_implementation = {ATTENTION}: {type(module).__name__} asks for "
            f"{', '.join(problems)}. Packed attention is causal, has no dropout and no mask but a "
            "sliding window. Use sdpa."
        )


# --- one flash kernel for the whole pack ----------------------------------------------------------


def _has_flash(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackLayout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    longest = max(layout.lengths)
    # The kernel counts the keys before the query; transformers counts the query's own key too.
    keys_before = -1 if window is None else window - 1
    result = varlen_attn(
        query,
        key,
        value,
        layout.cu_seqlens,
        layout.cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(keys_before, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(result, Tensor)  # a tuple only if auxiliary outputs are asked for
    return result


# --- buckets --------------------------------------------------------------------------------------


def _by_bucket(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackLayout,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    if computed_wide(query):
        wide = _by_bucket(query.float(), key.float(), value.float(), layout, scaling, window)
        return wide.to(query.dtype)
    plan = layout._plan(window)
    buckets = zip(
        _pad(query, plan.queries),
        _pad(key, plan.keys),
        _pad(value, plan.keys),
        plan.masks,
        strict=True,
    )
    outputs = [
        scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            # Faster than repeating the keys, in forward and backward.
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for queries, keys, values, mask in buckets
    ]
    return _unpad(outputs, plan.queries)


def _pad(tokens: Tensor, slots: _Slots) -> tuple[Tensor, ...]:
    """[S, H, D] to one [rows, H, width, D] for each bucket."""
    if slots.in_order:
        return (_as_bucket(tokens, slots.shapes[0]),)
    return _Pad.apply(tokens, slots)


def _unpad(buckets: list[Tensor], slots: _Slots) -> Tensor:
    """Adjoint of `_pad`: [S, H, D] without the padding."""
    if slots.in_order:
        return _as_tokens(buckets)
    return _Unpad.apply(slots, *buckets)


class _Pad(torch.autograd.Function):
    """Copy tokens to the slots of the buckets.

    The gradient is a gather too. The backward pass of plain indexing adds row by row, which is
    several times slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: _Slots) -> tuple[Tensor, ...]:
        ctx.slots = slots
        return _gathered(tokens, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        slots: _Slots = ctx.slots
        padded = _as_tokens(gradients)
        tokens = padded.index_select(0, slots.home)
        if len(slots.repeated):
            tokens.index_add_(0, slots.repeated, padded.index_select(0, slots.repeats))
        return tokens, None


class _Unpad(torch.autograd.Function):
    """Copy tokens back from their slots. The gradient of padding is zero, so it reaches no key."""

    @staticmethod
    def forward(ctx: Any, slots: _Slots, *buckets: Tensor) -> Tensor:
        ctx.slots = slots
        return _as_tokens(buckets).index_select(0, slots.home)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_gathered(gradient, ctx.slots, zero_padding=True)


def _gathered(tokens: Tensor, slots: _Slots, *, zero_padding: bool = False) -> tuple[Tensor, ...]:
    flat = tokens.reshape(len(tokens), -1)
    buckets = []
    for shape, source, padding in zip(slots.shapes, slots.sources, slots.padding, strict=True):
        bucket = flat.index_select(0, source)
        if zero_padding:
            bucket.index_fill_(0, padding, 0.0)
        buckets.append(_as_bucket(bucket.view(-1, *tokens.shape[1:]), shape))
    return tuple(buckets)


def _as_bucket(slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """[rows * width, H, D] as [rows, H, width, D]."""
    return slots.unflatten(0, shape).transpose(1, 2)


def _as_tokens(buckets: Sequence[Tensor]) -> Tensor:
    """Buckets [rows, H, width, D] one after the other, as [slots, H, D]."""
    flat = [bucket.transpose(1, 2).flatten(0, 1) for bucket in buckets]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


# --- which token goes where -----------------------------------------------------------------------


class _Piece(NamedTuple):
    """Consecutive queries of one sequence: a whole sequence, or a block of a window's width."""

    start: int
    length: int


class _Bucket(NamedTuple):
    """Pieces that one kernel call attends to, longest first."""

    pieces: list[_Piece]
    width: int  # number of slots for the queries of a piece
    look_back: int  # number of tokens before each piece that its queries may see

    @property
    def starts(self) -> np.ndarray:
        """[rows, 1]: the first token of each piece."""
        return np.array([[piece.start] for piece in self.pieces])

    @property
    def lengths(self) -> np.ndarray:
        """[rows, 1]: the number of tokens of each piece."""
        return np.array([[piece.length] for piece in self.pieces])

    @property
    def own(self) -> _Bucket:
        """The same pieces without the tokens before them."""
        return self._replace(look_back=0)


def _buckets(pieces: Iterable[_Piece], look_back: int = 0) -> list[_Bucket]:
    """Group pieces by length: close a bucket when its padding would cost more than another call."""
    longest_first = sorted(pieces, key=lambda piece: -piece.length)
    # Sequences of one length may lie in the pack as the kernel takes them. Padding would copy them.
    one_length = len({piece.length for piece in longest_first}) == 1
    multiple = 1 if one_length else _WIDTH_MULTIPLE
    buckets: list[_Bucket] = []
    padding = 0
    for piece in longest_first:
        if buckets:
            padding += buckets[-1].width - piece.length
        if not buckets or padding > _SLOTS_PER_CALL:
            width = -(-piece.length // multiple) * multiple
            buckets.append(_Bucket([], width, look_back))
            padding = width - piece.length
        buckets[-1].pieces.append(piece)
    return buckets


def _cut(lengths: Sequence[int], window: int | None) -> tuple[list[_Piece], list[_Piece]]:
    """(first pieces, which see only themselves; later ones, which see `window` tokens more)."""
    firsts: list[_Piece] = []
    laters: list[_Piece] = []
    start = 0
    for length in lengths:
        size = window or length
        firsts.append(_Piece(start, min(size, length)))
        laters += [_Piece(start + i, min(size, length - i)) for i in range(size, length, size)]
        start += length
    return firsts, laters


@dataclass(frozen=True, slots=True)
class _Slots:
    """Places of the tokens of a pack in the padded buckets, and the way back. Indices are int64."""

    shapes: tuple[tuple[int, int], ...]  # (rows, width) of each bucket
    sources: tuple[Tensor, ...]  # token of each slot, by bucket; padding names a token too
    padding: tuple[Tensor, ...]  # slots of padding, by bucket
    home: Tensor  # [S] slot of each token in the joined buckets, in the row where it is a query
    repeated: Tensor  # tokens that a later piece looks back at
    repeats: Tensor  # slots of `repeated` in the joined buckets, in the row of that later piece
    in_order: bool  # one bucket that is the pack itself: nothing to copy

    @staticmethod
    def of(buckets: Sequence[_Bucket], tokens: int, device: torch.device) -> _Slots:
        """Slots for the keys of these buckets; for their queries, if none looks back."""
        home = np.empty(tokens, np.int64)
        sources, padding, repeated, repeats = [], [], [], []
        first_slot = 0
        for bucket in buckets:
            source = _sources(bucket)
            slot = np.arange(source.size).reshape(source.shape)
            before, own = slice(None, bucket.look_back), slice(bucket.look_back, None)
            real = np.arange(bucket.width) < bucket.lengths
            home[source[:, own][real]] = first_slot + slot[:, own][real]
            sources.append(source)
            padding.append(slot[:, own][~real])
            repeated.append(source[:, before])
            repeats.append(first_slot + slot[:, before])
            first_slot += source.size
        return _Slots(
            shapes=tuple(source.shape for source in sources),
            sources=tuple(_index([source], device) for source in sources),
            padding=tuple(_index([slots], device) for slots in padding),
            home=_index([home], device),
            repeated=_index(repeated, device),
            repeats=_index(repeats, device),
            in_order=len(sources) == 1 and np.array_equal(sources[0].ravel(), np.arange(tokens)),
        )


def _sources(bucket: _Bucket) -> np.ndarray:
    """[rows, look_back + width]: the token of each slot; padding repeats its piece's last token."""
    columns = np.arange(bucket.look_back + bucket.width) - bucket.look_back
    # A token of the same sequence: what padding holds is finite wherever the sequence is.
    return bucket.starts + np.minimum(columns, bucket.lengths - 1)


def _index(parts: Sequence[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(device)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The buckets of one kind of layer, each with its mask (None: causal)."""

    queries: _Slots
    keys: _Slots
    masks: tuple[Tensor | None, ...]

    @staticmethod
    def of(lengths: Sequence[int], window: int | None, device: torch.device) -> _Plan:
        firsts, laters = _cut(lengths, window)
        buckets = _buckets(firsts) + _buckets(laters, window or 0)
        keys = queries = _Slots.of(buckets, sum(lengths), device)
        if laters:
            queries = _Slots.of([bucket.own for bucket in buckets], sum(lengths), device)
        return _Plan(queries, keys, tuple(_mask(bucket, device) for bucket in buckets))


def _mask(bucket: _Bucket, device: torch.device) -> Tensor | None:
    """Bool [width, look_back + width]: whether query i sees slot j, token `j - look_back`."""
    window = bucket.look_back
    if window == 0:
        return None
    # i - window < j - window <= i
    slots = torch.ones(bucket.width, window + bucket.width, dtype=torch.bool, device=device)
    return slots.triu(1).tril(window)

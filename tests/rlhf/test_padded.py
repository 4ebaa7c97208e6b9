"""The micro-batch that formulas see, against a plain loop over the flat record."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf.batches import PairBatch, PreferenceBatch, SupervisedBatch, TrainBatch
from rlhf.batches.padded import padded, spread
from rlhf.batches.ragged import (
    NO_TOKENS,
    PairSequences,
    PreferenceSequences,
    RolloutSequences,
    Sequences,
    SupervisedSequences,
    TrainSequences,
)
from tests.rlhf.toy_records import pieces, record
from tests.rlhf.toy_world import batch_for, built, sequences_of

SHOWN: dict[type[Any], type[Any]] = {
    TrainSequences: TrainBatch,
    SupervisedSequences: SupervisedBatch,
    PreferenceSequences: PreferenceBatch,
    PairSequences: PairBatch,
}
TABLES = ("token_ids", "loss_mask", "rollout_logprobs", "proximal_logprobs", "reference_logprobs")
COLUMNS = ("advantages", "staleness")
every_kind = pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.__name__)
lengths_st = st.lists(st.integers(1, 9), min_size=1, max_size=10)


def own_logprobs(sequences: Sequences) -> Tensor:
    """What the policy would say of the trained tokens: -1, -2, ..."""
    return -torch.arange(1.0, int(sequences.loss_mask.sum()) + 1)


def table(rows: list[list[Any]], width: int) -> list[list[Any]]:
    """Lists filled with zeros on the right, up to `width`."""
    return [row + [0] * (width - len(row)) for row in rows]


def expected_columns(sequences: Any, own: Tensor) -> dict[str, Any]:
    """Every field of the padded batch as nested lists."""
    found, width, remaining = pieces(sequences), max(sequences.lengths.tolist()), iter(own.tolist())
    out: dict[str, Any] = {"lengths": [len(piece["token_ids"]) for piece in found]}
    weighed = [[on * piece["weights"][0] for on in piece["loss_mask"]] for piece in found]
    out["token_weights"] = table(weighed, width)
    mine = [[next(remaining) if on else 0.0 for on in piece["loss_mask"]] for piece in found]
    for name in TABLES:
        if name in found[0]:
            rows = [piece[name] for piece in found]
            missing = not len(getattr(sequences, name))
            if missing:
                rows = mine if name == "proximal_logprobs" else rows
            out[name] = rows if missing and name == "reference_logprobs" else table(rows, width)
    return out | {name: [piece[name][0] for piece in found] for name in COLUMNS if name in found[0]}


@every_kind
@given(lengths=lengths_st, with_logprobs=st.booleans())
def test_every_field_is_that_of_a_plain_loop(kind: type[Any], lengths: list[int], with_logprobs: bool) -> None:
    sequences = record(kind, lengths)
    if not with_logprobs:
        absent = [name for name in ("proximal_logprobs", "reference_logprobs") if name in kind.per_token]
        sequences = replace(sequences, **dict.fromkeys(absent, NO_TOKENS))
    own = own_logprobs(sequences)
    batch = padded(sequences, own)
    assert type(batch) is SHOWN[kind]
    assert {item.name: getattr(batch, item.name).tolist() for item in fields(batch)} == expected_columns(sequences, own)
    assert len(batch) == len(lengths)


@every_kind
def test_the_types_of_a_micro_batch(kind: type[Any]) -> None:
    sequences = record(kind, [3, 1, 4])
    batch = padded(sequences, own_logprobs(sequences))
    special = {"token_ids": torch.int64, "lengths": torch.int64, "loss_mask": torch.bool, "staleness": torch.int64}
    for item in fields(batch):
        assert getattr(batch, item.name).dtype == special.get(item.name, torch.float32), item.name


def test_the_policy_s_own_log_probs_stand_for_proximal_ones_that_are_not_there_and_carry_no_gradient() -> None:
    sequences = replace(record(TrainSequences, [3, 4]), proximal_logprobs=NO_TOKENS)
    own = own_logprobs(sequences).requires_grad_()
    batch = padded(sequences, own)
    assert batch.proximal_logprobs[batch.loss_mask].tolist() == own.tolist()
    assert batch.proximal_logprobs[~batch.loss_mask].abs().sum() == 0
    assert not batch.proximal_logprobs.requires_grad


def test_proximal_log_probs_that_are_there_are_taken() -> None:
    sequences = record(TrainSequences, [3, 4])
    batch = padded(sequences, own_logprobs(sequences))
    present = torch.arange(4) < batch.lengths[:, None]
    assert batch.proximal_logprobs[present].tolist() == sequences.proximal_logprobs.tolist()


def test_where_no_reference_is_needed_its_log_probs_have_no_tokens_and_cannot_be_used() -> None:
    sequences = replace(record(TrainSequences, [3, 1, 4]), reference_logprobs=NO_TOKENS)
    batch = padded(sequences, own_logprobs(sequences))
    assert batch.reference_logprobs.shape == (3, 0)
    with pytest.raises(RuntimeError, match="size of tensor"):
        batch.proximal_logprobs - batch.reference_logprobs


@pytest.mark.parametrize("kind", [Sequences, RolloutSequences], ids=lambda kind: kind.__name__)
def test_a_record_that_no_loss_trains_on_is_refused(kind: type[Any]) -> None:
    with pytest.raises(TypeError, match=f"no loss trains on {kind.__name__}"):
        padded(record(kind, [3]), torch.zeros(2))


@every_kind
def test_read_only_arrays_as_ray_delivers_them_are_copied_without_a_warning(kind: type[Any]) -> None:
    sequences = record(kind, [3, 1, 4])
    before = pieces(sequences)
    for item in fields(sequences):
        getattr(sequences, item.name).setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = padded(sequences, own_logprobs(sequences))
    for item in fields(batch):
        getattr(batch, item.name).zero_()
    assert pieces(sequences) == before


@pytest.mark.parametrize("name", ["agapo", "grouper", "dpo", "sft"])
def test_the_flat_record_of_these_tests_shows_the_batch_again(name: str) -> None:
    """float64 stays float64, so that laws can be proven at that precision."""
    batch = batch_for(built(name))
    again = padded(sequences_of(batch), torch.zeros(int(batch.loss_mask.sum()), dtype=torch.float64))
    present = torch.arange(batch.token_ids.shape[1]) < batch.lengths[:, None]
    batch = replace(batch, token_ids=batch.token_ids.masked_fill(~present, 0))
    assert all(torch.equal(getattr(again, item.name), getattr(batch, item.name)) for item in fields(batch))
    assert again.token_weights.dtype == torch.float64


# --- spread -----------------------------------------------------------------------------------------------------------


@given(bits=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6))
def test_spreading_puts_values_on_the_mask_row_by_row(bits: list[list[bool]]) -> None:
    mask = torch.tensor(bits)
    values = torch.arange(1.0, int(mask.sum()) + 1, requires_grad=True)
    found = spread(values, mask)
    remaining = iter(values.tolist())
    assert found.tolist() == [[next(remaining) if on else 0.0 for on in row] for row in bits]
    slopes = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    (found * slopes).sum().backward()
    assert torch.equal(torch.zeros(0) if values.grad is None else values.grad, slopes[mask])


def test_log_probs_in_pack_order_go_to_their_own_tokens() -> None:
    sequences = record(TrainSequences, [3, 4, 2])
    own = own_logprobs(sequences)
    rows = padded(sequences, own)
    assert torch.equal(spread(own, rows.loss_mask)[rows.loss_mask], own)
    flat = np.zeros(9, np.float32)
    flat[sequences.loss_mask] = own.numpy()
    present = torch.arange(4) < rows.lengths[:, None]
    assert spread(own, rows.loss_mask)[present].tolist() == flat.tolist()

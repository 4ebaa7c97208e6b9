"""Packed attention against a softmax per sequence, and packed models against each sequence alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Exaone4Config, Exaone4ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf.training import attention
from rlhf.training.attention import ATTENTION, PackLayout, packed_attention, padding_slots, register

CPU = torch.device("cpu")
HEAD_DIM = 8
SCALING = 0.3
WINDOW = 6
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def projections(
    tokens: int, heads: int, key_heads: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a model gives them: [1, H, S, D], stored token by token."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(1, tokens, h, HEAD_DIM) for h in (heads, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def visible(length: int, window: int | None) -> Tensor:
    query = torch.arange(length)[:, None]
    key = torch.arange(length)
    return (key <= query) & (key > query - (window or length))


def naive(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    """[1, S, H, D]: one softmax over visible keys for each sequence."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    outputs = []
    for q, k, v in zip(*(tensor.split(list(lengths), 2) for tensor in (query, key, value)), strict=True):
        scores = SCALING * q @ k.transpose(2, 3)
        hidden = ~visible(q.shape[2], window)
        outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, 2).transpose(1, 2)


def packed(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None) -> Tensor:
    layout = PackLayout.of(lengths, query.device)
    module = torch.nn.Module()
    output, weights = packed_attention(
        module, query, key, value, None, scaling=SCALING, sliding_window=window, layout=layout
    )
    assert weights is None
    return output


def assert_agree(
    tensors: tuple[Tensor, Tensor, Tensor], lengths: Sequence[int], window: int | None, atol: float
) -> None:
    """Values and the gradients of query, key and value."""
    output, expected = packed(*tensors, lengths, window), naive(*tensors, lengths, window)
    torch.testing.assert_close(output, expected, atol=atol, rtol=0)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    gradients = torch.autograd.grad(output, tensors, upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=atol, rtol=0)


# --- the function alone ---------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]),
)
@example(lengths=[1], window=None, heads=(4, 4))
@example(lengths=[1, 1, 1], window=1, heads=(6, 2))
@example(lengths=[17], window=None, heads=(6, 2))
@example(lengths=[12, 12, 12], window=None, heads=(6, 2))
@example(lengths=[12, 12, 12], window=12, heads=(4, 4))
@example(lengths=[12, 12, 12], window=11, heads=(4, 4))
@example(lengths=[40, 3, 5, 6, 7, 13], window=6, heads=(6, 2))
def test_a_pack_gives_what_a_softmax_per_sequence_gives(
    lengths: list[int], window: int | None, heads: tuple[int, int]
) -> None:
    assert_agree(projections(sum(lengths), *heads), lengths, window, atol=1e-12)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_float32_agrees_to_its_precision(window: int | None) -> None:
    lengths = [1, 30, 6, 29, 5, 7, 12]
    assert_agree(projections(sum(lengths), 6, 2, torch.float32), lengths, window, atol=3e-6)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_bfloat16_agrees_to_its_precision(window: int | None) -> None:
    lengths = [1, 30, 6, 29, 5, 7, 12]
    tensors = projections(sum(lengths), 6, 2, torch.float32)
    output = packed(*(tensor.bfloat16() for tensor in tensors), lengths, window)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), naive(*tensors, lengths, window), atol=0.03, rtol=0)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), tensors))


def test_queries_stored_head_by_head_give_the_same() -> None:
    tensors = projections(30, 4, 2)
    contiguous = tuple(tensor.contiguous() for tensor in tensors)
    assert torch.equal(packed(*contiguous, [20, 10], None), packed(*tensors, [20, 10], None))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_not_even_a_nan_leaves_its_sequence(window: int | None) -> None:
    lengths = [5, 14, 9]
    query, key, value = projections(sum(lengths), 4, 2)
    clean = packed(query, key, value, lengths, window)
    # The last token is the one that padding repeats.
    poison = torch.zeros(sum(lengths), 1)
    poison[18] = torch.nan
    output = packed(query + poison, key + poison, value + poison, lengths, window)
    others = torch.tensor([*range(5), *range(19, 28)])
    assert output[:, 18].isnan().all()
    assert torch.equal(output[:, others], clean[:, others])
    gradients = torch.autograd.grad(output[:, others].sum(), (query, key, value))
    assert all(gradient[:, :, others].isfinite().all() for gradient in gradients)


# --- what it costs --------------------------------------------------------------------------------


def scores_computed(monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int], window: int | None) -> int:
    """Query-key pairs that the kernel calls of one forward pass span, for each head."""
    pairs = []

    def counted(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
        pairs.append(query.shape[0] * query.shape[2] * key.shape[2])
        return torch.nn.functional.scaled_dot_product_attention(query, key, *rest, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counted)
    packed(*projections(sum(lengths), 1, 1, torch.float32), lengths, window)
    return sum(pairs)


def test_the_cost_grows_with_the_number_of_sequences_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [20, 30, 25, 40]
    once = scores_computed(monkeypatch, lengths, None)
    assert once < 1.5 * sum(length**2 for length in lengths)
    assert scores_computed(monkeypatch, lengths * 8, None) <= 8 * once


def test_a_window_makes_a_long_sequence_cost_its_length_times_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    window = 12
    # Two blocks of keys for each block of queries; the last block of a sequence is padded.
    assert scores_computed(monkeypatch, [400, 250], window) <= 2 * window * (650 + 2 * window)
    assert scores_computed(monkeypatch, [4003], window) <= 2 * window * (4003 + window)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_padding_slots_are_what_the_kernel_pads(lengths: list[int]) -> None:
    plan = PackLayout.of(lengths, CPU)._plan(None)
    assert padding_slots(lengths) == sum(rows * width for rows, width in plan.keys.shapes) - sum(lengths)
    assert padding_slots(lengths) <= attention._SLOTS_PER_CALL * len(plan.masks)


def test_sequences_of_one_length_need_no_padding_and_no_copy() -> None:
    assert padding_slots([7, 7, 7]) == 0
    assert PackLayout.of([7, 7, 7], CPU)._plan(None).keys.in_order
    assert PackLayout.of([40], CPU)._plan(None).keys.in_order
    assert not PackLayout.of([7, 8, 7], CPU)._plan(None).keys.in_order


def test_every_layer_of_a_kind_shares_one_plan() -> None:
    layout = PackLayout.of([9, 4], CPU)
    assert layout._plan(None) is layout._plan(9)
    assert layout._plan(8) is layout._plan(8)
    assert layout._plan(8) is not layout._plan(None)


# --- inside a model -------------------------------------------------------------------------------


def exaone(implementation: str) -> PreTrainedModel:
    """Three sliding layers and a full one."""
    config = Exaone4Config(
        **SIZES, **HEADS, sliding_window=WINDOW, sliding_window_pattern=4, attn_implementation=implementation
    )
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    return Exaone4ForCausalLM(config)


def llama(implementation: str) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attn_implementation=implementation))


MODELS = [exaone, llama]
LENGTHS = [3, 17, 1, 6, 16, 25, 7]


def twins(build: Callable[[str], PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(with packed attention, with sdpa), of equal weights."""
    register()
    torch.manual_seed(0)
    packed_model, plain_model = build(ATTENTION), build("sdpa")
    plain_model.load_state_dict(packed_model.state_dict())
    return packed_model, plain_model


def some_tokens() -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))


def packed_logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    device = token_ids.device
    positions = torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]
    layout = PackLayout.of(LENGTHS, device)
    return model(input_ids=token_ids, position_ids=positions, use_cache=False, layout=layout).logits


def gradients_of(model: PreTrainedModel, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.logsumexp(-1).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("build", MODELS)
def test_a_packed_model_gives_what_it_gives_for_each_sequence_alone(build: Callable[[str], PreTrainedModel]) -> None:
    packed_model, plain_model = twins(build)
    token_ids = some_tokens()
    together = packed_logits(packed_model, token_ids)
    alone = [plain_model(input_ids=ids, use_cache=False).logits for ids in token_ids.split(LENGTHS, 1)]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=0)
    expected = gradients_of(plain_model, torch.cat(alone, 1))
    for name, gradient in gradients_of(packed_model, together).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("build", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(build: Callable[[str], PreTrainedModel]) -> None:
    model, _ = twins(build)
    model.train()
    expected = gradients_of(model, packed_logits(model, some_tokens()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    found = gradients_of(model, packed_logits(model, some_tokens()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("build", MODELS)
def test_a_changed_token_changes_no_other_sequence(build: Callable[[str], PreTrainedModel]) -> None:
    model, _ = twins(build)
    token_ids = some_tokens()
    before = packed_logits(model, token_ids).split(LENGTHS, 1)
    changed = 5
    token_ids[0, sum(LENGTHS[:changed])] += 1
    after = packed_logits(model, token_ids % SIZES["vocab_size"]).split(LENGTHS, 1)
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert same == [index != changed for index in range(len(LENGTHS))]


def test_the_name_is_not_written_with_the_model(tmp_path: Any) -> None:
    register()
    llama(ATTENTION).save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS)
def test_a_model_without_a_layout_is_refused(build: Callable[[str], PreTrainedModel]) -> None:
    model, _ = twins(build)
    with pytest.raises(ValueError, match=r"layout=PackLayout\.of"):
        model(input_ids=some_tokens(), use_cache=False)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_a_sequence_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="one token or more"):
        PackLayout.of(lengths, CPU)


def test_a_layout_of_another_pack_is_refused() -> None:
    layout = PackLayout.of([4, 4], CPU)
    tensors = projections(9, 2, 2)
    with pytest.raises(ValueError, match="the layout's 8 tokens"):
        packed_attention(torch.nn.Module(), *tensors, None, scaling=1.0, layout=layout)
    batch = tuple(tensor[:, :, :8].repeat(2, 1, 1, 1) for tensor in tensors)
    with pytest.raises(ValueError, match="one row"):
        packed_attention(torch.nn.Module(), *batch, None, scaling=1.0, layout=layout)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(options: dict[str, Any], problem: str) -> None:
    layout = PackLayout.of([9], CPU)
    with pytest.raises(ValueError, match=f"asks for {problem}"):
        packed_attention(torch.nn.Module(), *projections(9, 2, 2), None, layout=layout, **options)


# --- the branch for CUDA --------------------------------------------------------------------------


def varlen_by_its_documentation(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """`varlen_attn` for machines without CUDA, from what its docstring says of the arguments."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert scale == SCALING
    before, after = window_size
    assert after == 0
    heads_first = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    return naive(*heads_first, cu_seq_q.diff().tolist(), None if before == -1 else before + 1)[0]


@pytest.mark.parametrize("window", [None, 1, WINDOW])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_the_flash_kernel_gets_the_arguments_it_documents(
    window: int | None, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1, 30, 6, 29]
    tensors = projections(sum(lengths), *heads)
    expected = packed(*tensors, lengths, window)
    monkeypatch.setattr(attention, "_has_flash", lambda query: True)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_its_documentation)
    torch.testing.assert_close(packed(*tensors, lengths, window), expected, atol=1e-12, rtol=0)


def test_float32_and_cpu_tensors_do_not_go_to_the_flash_kernel() -> None:
    assert not attention._has_flash(torch.zeros(1, dtype=torch.bfloat16))
    assert not attention._has_flash(torch.zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, WINDOW])
def test_the_flash_kernel_agrees_with_a_softmax_per_sequence(window: int | None) -> None:
    lengths = [1, 30, 6, 29, 5, 7, 12]
    tensors = projections(sum(lengths), 6, 2, torch.float32)
    output = packed(*(tensor.cuda().bfloat16() for tensor in tensors), lengths, window).cpu().float()
    expected = naive(*tensors, lengths, window)
    torch.testing.assert_close(output, expected, atol=0.03, rtol=0)
    for gradient, wanted in zip(
        torch.autograd.grad(output.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, atol=0.1, rtol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_packed_model_on_a_gpu_gives_what_it_gives_for_each_sequence_alone() -> None:
    packed_model, plain_model = (model.to("cuda", torch.bfloat16) for model in twins(exaone))
    token_ids = some_tokens().cuda()
    together = packed_logits(packed_model, token_ids)
    alone = torch.cat([plain_model(input_ids=ids, use_cache=False).logits for ids in token_ids.split(LENGTHS, 1)], 1)
    assert (together - alone).float().norm() < 0.02 * alone.float().norm()  # both are rounded
    expected = gradients_of(plain_model, alone)
    for name, gradient in gradients_of(packed_model, together).items():
        assert (gradient - expected[name]).float().norm() < 0.05 * expected[name].float().norm(), name

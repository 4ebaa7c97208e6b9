"""A Hugging Face model with its head replaced, against the logits of the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Exaone4Config, Exaone4ForCausalLM

from rlhf.batches.ragged import Sequences
from rlhf.errors import ConfigError
from rlhf.training.attention import ATTENTION, register
from rlhf.training.token_model import Pack, TokenModel, check_head
from tests.rlhf.naive_logprobs import logprobs_and_entropy

CPU = torch.device("cpu")
VOCABULARY = 53
LENGTHS = (9, 1, 14, 5)


def causal_lm(attention: str, *, tied: bool = True, **changes: Any) -> Exaone4ForCausalLM:
    """A hybrid EXAONE in float64, the same weights every time; a window of 6 tokens."""
    register()
    torch.manual_seed(0)
    config = Exaone4Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        tie_word_embeddings=tied,
        initializer_range=0.3,
        attn_implementation=attention,
        **changes,
    )
    return Exaone4ForCausalLM(config).double()


def sequences() -> Sequences:
    random = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    mask = random.random(sum(LENGTHS)) < 0.6
    mask[offsets[:-1]] = False
    return Sequences(random.integers(0, VOCABULARY, sum(LENGTHS), np.int32), mask, offsets)


def naive(model: Exaone4ForCausalLM, given: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of the trained tokens from the logits of each sequence alone."""
    found = []
    cut = zip(given.per_sequence(given.token_ids), given.per_sequence(given.loss_mask), strict=True)
    for ids, mask in cut:
        row, trained = torch.from_numpy(ids).long(), torch.from_numpy(mask)
        logits = model(row[None], use_cache=False).logits[0, :-1][trained[1:]]
        found.append(torch.stack(logprobs_and_entropy(logits, row[trained], temperature)))
    logprobs, entropy = torch.cat(found, 1)
    return logprobs, entropy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_model_s_own_logits(tied: bool, temperature: float) -> None:
    plain, policy = causal_lm("sdpa", tied=tied), TokenModel(causal_lm(ATTENTION, tied=tied))
    expected, expected_entropy = naive(plain, sequences(), temperature)
    found, entropy = policy(Pack.of(sequences(), CPU), temperature)
    # Its norms are float32 even here, so that a last bit may differ.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-6, rtol=0)
    assert found.std() > 0.5
    slopes = torch.linspace(-1.0, 2.0, len(found), dtype=torch.float64)
    (found * slopes).sum().backward()
    (expected * slopes).sum().backward()
    for (name, ours), theirs in zip(policy.causal_lm.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=0, msg=name)
        assert theirs.grad.abs().max() > 1e-2, name


def test_the_head_is_the_model_s_own_and_counts_once() -> None:
    model = causal_lm(ATTENTION)
    policy = TokenModel(model)
    assert policy.head.weight is model.get_output_embeddings().weight
    assert sum(1 for _ in policy.parameters()) == sum(1 for _ in model.parameters())


def test_a_pack_that_trains_nothing_reaches_every_parameter_with_a_zero_gradient() -> None:
    policy = TokenModel(causal_lm(ATTENTION))
    logprobs, entropy = policy(Pack.of(sequences().slice(0, 0), CPU), 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert all(gradient is not None and gradient.abs().sum() == 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("key", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.5), ("logits_scaling", 8.0)]
)
def test_a_model_that_changes_its_logits_after_the_head_is_refused(key: str, value: float) -> None:
    model = causal_lm(ATTENTION)
    setattr(model.config, key, value)
    with pytest.raises(ConfigError, match=f"must have a plain output head.*sets {key}, which changes the logits"):
        TokenModel(model)
    setattr(model.config, key, None if key == "final_logit_softcapping" else 1.0)
    check_head(model)


def test_a_head_that_is_not_linear_is_refused() -> None:
    model = causal_lm(ATTENTION)
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, VOCABULARY)))
    with pytest.raises(ConfigError, match=r"Exaone4ForCausalLM: must have a linear output head\..*Sequential"):
        TokenModel(model)

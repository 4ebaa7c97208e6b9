"""A causal language model that returns log-probs of its trained tokens, and never logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf.batches.ragged import Sequences
from rlhf.errors import ConfigError
from rlhf.losses.logprobs import head_logprobs
from rlhf.training.attention import PackLayout
from rlhf.training.cpu_bfloat16 import computed_wide, widen_linears

# Models that do more to their logits than one linear layer. Their log-probs would come out wrong here.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True, slots=True)
class Pack:
    """The sequences of a micro-batch one after the other, without padding.

    `token_ids`, `position_ids` int64 [1, S]; `predictors` int64 [M] are the places whose hidden state predicts the
    trained tokens `targets` int64 [M], in order.
    """

    token_ids: Tensor
    position_ids: Tensor
    layout: PackLayout
    predictors: Tensor
    targets: Tensor

    @staticmethod
    def of(sequences: Sequences, device: torch.device) -> Pack:
        if not len(sequences):
            return Pack._idle(device)
        lengths = sequences.lengths
        token_ids = torch.from_numpy(sequences.token_ids.astype(np.int64)).to(device)
        positions = np.arange(sequences.offsets[-1]) - np.repeat(sequences.offsets[:-1], lengths)
        trained = torch.from_numpy(np.flatnonzero(sequences.loss_mask)).to(device)
        return Pack(
            token_ids=token_ids[None],
            position_ids=torch.from_numpy(positions).to(device)[None],
            layout=PackLayout.of(lengths.tolist(), device),
            # The first token of a sequence is never trained, so the place before is of the same sequence.
            predictors=trained - 1,
            targets=token_ids[trained],
        )

    @staticmethod
    def _idle(device: torch.device) -> Pack:
        """Two tokens that train nothing: keeps a rank without sequences in step with the collectives of the others."""
        tokens, none = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.int64)
        layout = PackLayout.of([2], device)
        return Pack(tokens, torch.arange(2, device=device)[None], layout, none.to(device), none.to(device))


class OutputHead(nn.Module):
    """The model's output head, applied to the hidden states that predict trained tokens.

    A module of its own, so that ZeRO-3 gathers the weight once for a forward and once for a backward pass, not once for
    each chunk. A fused kernel for log-probs would take the place of `head_logprobs` here.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        tensors = [hidden, self.weight, self.bias]
        if computed_wide(self.weight):
            tensors = [None if tensor is None else tensor.float() for tensor in tensors]
        states, weight, bias = tensors
        return head_logprobs(states, weight, targets, bias=bias, temperature=temperature)


class TokenModel(nn.Module):
    """`causal_lm` with its head replaced: tokens in, log-probs and entropy of the trained ones out."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        check_head(causal_lm)
        check_layers(causal_lm)
        widen_linears(causal_lm)
        self.causal_lm = causal_lm
        self.head = OutputHead(causal_lm.get_output_embeddings())

    def forward(self, pack: Pack, temperature: float) -> tuple[Tensor, Tensor]:
        """(log-probs [M] with gradient, entropy [M] without) of the pack's trained tokens, float32, in nats."""
        states = self.causal_lm.base_model(
            input_ids=pack.token_ids, position_ids=pack.position_ids, layout=pack.layout, use_cache=False
        )
        hidden = states.last_hidden_state[0].index_select(0, pack.predictors)
        return self.head(hidden, pack.targets, temperature)


def check_head(causal_lm: Any) -> None:
    """Raise ConfigError unless the model's logits are one linear layer of its last hidden states."""
    head, name = causal_lm.get_output_embeddings(), type(causal_lm).__name__
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            [
                f"model = {name}: must have a linear output head. Log-probs are computed from it without logits, and "
                f"its head is {type(head).__name__}. Use another model."
            ]
        )
    changed = [key for key in _LOGIT_CHANGES if getattr(causal_lm.config, key, None) not in (None, 1, 1.0)]
    if changed:
        raise ConfigError(
            [
                f"model = {name}: must have a plain output head. Its configuration sets {changed[0]}, which changes "
                "the logits after the head; log-probs would be wrong. Use another model."
            ]
        )


def check_layers(causal_lm: Any) -> None:
    """Raise ConfigError where a layer mixes tokens in a way that would cross the sequences of a pack."""
    kinds = set(getattr(causal_lm.config, "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(
            [
                f"model = {type(causal_lm).__name__}: must have layers of full_attention or sliding_attention alone. "
                f"It has {', '.join(unknown)}, which would see across the sequences of a pack. Use another model."
            ]
        )

"""bfloat16 on processors that cannot multiply it.

Without instructions for it, a bfloat16 matrix product of torch is 10 to 100 times slower than a float32 one. Here
weights and activations stay bfloat16 in memory, and each product is computed in float32 and rounded once: what hardware
with float32 accumulation does too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


@cache
def is_slow() -> bool:
    """Whether this processor lacks fast bfloat16 products."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computed_wide(tensor: Tensor) -> bool:
    """Whether products of `tensor` are to be computed in float32 instead."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and is_slow()


def widen_linears(model: nn.Module) -> None:
    """Let every linear layer of a bfloat16 model on such a processor compute in float32."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and is_slow():
            module.__class__ = WideLinear


class WideLinear(nn.Linear):
    """A linear layer with bfloat16 inputs, outputs and weights that multiplies in float32."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that nn.Linear has)
        return _WideProduct.apply(input, self.weight, self.bias)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.has_bias = bias is not None
        wide = linear(values.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        upstream = gradients[0].float()
        to_values = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_values = (upstream @ weight.float()).to(values.dtype)
        rows = upstream.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            to_weight = (rows.T @ values.float().flatten(0, -2)).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            to_bias = rows.sum(0).to(weight.dtype)
        return to_values, to_weight, to_bias

"""AGAPO, the online RL of EXAONE 4.0."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlhf.advantages import agapo_advantages
from rlhf.advantages.agapo import AllIncorrect
from rlhf.algorithms.base import About, TokenLoss
from rlhf.algorithms.grpo import StdDdof, StdEps
from rlhf.algorithms.kl import Kl
from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.algorithms.registry import register
from rlhf.batches import ScoredSamples, TrainBatch
from rlhf.losses.policy import reinforce
from rlhf.losses.reduce import Reduction
from rlhf.selection import GroupFilter


class GlobalAdvantages(OnlineAlgorithm):
    """Leave-one-out within the group, then a z-score over all samples of the step (2507.11407, eq. 2)."""

    all_incorrect: Annotated[
        AllIncorrect,
        Field(
            description="groups that nobody solved: literal = eq. 2 (exactly 0), batch_baseline = against the mean "
            "reward of the batch, constant = minus all_incorrect_constant"
        ),
    ] = "literal"
    all_incorrect_constant: Annotated[
        float, Field(ge=0.0, allow_inf_nan=False, description="taken off after the z-score; only with constant")
    ] = 0.1
    std_eps: StdEps = 1e-6
    std_ddof: StdDdof = 0

    def group_advantages(self, rewards: Tensor, batch: ScoredSamples) -> Tensor:
        return agapo_advantages(
            rewards,
            batch.group_index,
            batch.correct,
            all_incorrect=self.all_incorrect,
            constant=self.all_incorrect_constant,
            eps=self.std_eps,
            ddof=self.std_ddof,
        )


@register("agapo")
class Agapo(GlobalAdvantages):
    """`J = (1/N) sum_i (A_i log pi_theta(o_i) - beta KL(pi_theta, pi_ref))`, with the token sum of the log-prob.

    The KL is the sequence's own: `loss = -mean_i sum_t sg(A_i - beta sum_{s>=t} u_s) lp_t` with `u = log(pi_theta /
    pi_ref)`; it enters after normalisation (2506.09477). No ratio and no clip: one update on fresh samples. Asymmetric
    sampling: all-correct groups are dropped, all-incorrect ones kept; they carry the KL and, beyond `literal`, a
    negative advantage.
    """

    about: ClassVar[About] = About(
        title="AGAPO (EXAONE 4.0)",
        formula="J = (1/N) sum_i sum_t sg(A_i - beta sum_{s>=t} log(pi_theta / pi_ref)_s) log pi_theta(o_t)\n"
        "A_i = (L_i - mean L) / (std L + std_eps) over the batch,  L_i = r_i - mean of the others of its group",
        source="EXAONE 4.0, arXiv 2507.11407, eq. 1-2; gradient of the sequence KL: arXiv 2506.09477",
        deviations=(
            "The text wants a small negative reward for all-incorrect groups, but eq. 2 gives them exactly 0: three "
            "named treatments, all_incorrect = literal, batch_baseline or constant.",
            "beta, G, the learning rate, ddof and eps are not published; every one is a field.",
        ),
    )
    has_policy_ratio: ClassVar[bool] = False

    reduction: Reduction = "sequence_sum"
    kl: Kl = Field(
        default=Kl(coefficient=1e-3, estimator="k1", placement="reward_to_go"),
        description="the sequence's KL; beta is unpublished, 1e-3 is ours",
    )
    group_filter: GroupFilter = "all_correct"

    def policy_loss(self, logprobs: Tensor, batch: TrainBatch, advantages: Tensor) -> TokenLoss:
        return TokenLoss(reinforce(logprobs, advantages))

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from rlhf.errors import AttestationError
from rlhf.weight_sync.attestation import Evidence, attest, probe_gap

DIGESTS = {"model.embed.weight": "float32[2x2]:01", "lm_head.weight": "float32[2x2]:02"}
LEARNER = Evidence(7, [DIGESTS], [[0.0, -1.0, -2.0], [0.0, -3.0]])
LIMITS = (1e-3, 1e-2)


def complaint(*engines: Evidence, learner: Evidence = LEARNER) -> str:
    with pytest.raises(AttestationError) as caught:
        attest(learner, engines, LIMITS)
    return str(caught.value)


def shifted(gap: float) -> Evidence:
    return replace(LEARNER, probe_logprobs=[[0.0, -1.0 + gap, -2.0], [0.0, -3.0]])


def test_equal_evidence_passes_with_a_gap_of_zero() -> None:
    assert attest(LEARNER, [LEARNER, LEARNER], LIMITS) == (0.0, 0.0)


def test_the_largest_gap_over_the_engines_is_returned() -> None:
    mean, largest = attest(LEARNER, [shifted(0.001), shifted(-0.004), LEARNER], LIMITS)
    assert mean == pytest.approx(0.004 / 5)
    assert largest == pytest.approx(0.004)


def test_the_message_names_the_version_that_was_not_committed() -> None:
    assert complaint(replace(LEARNER, version=6)).startswith("weight version 7 was not committed")


def test_a_skipped_tensor_is_named() -> None:
    text = complaint(LEARNER, replace(LEARNER, digests=[{"model.embed.weight": DIGESTS["model.embed.weight"]}]))
    assert "engine 1: tensor lm_head.weight never arrived" in text
    assert "engine 0" not in text


def test_an_altered_tensor_is_named_with_both_digests() -> None:
    text = complaint(replace(LEARNER, digests=[{**DIGESTS, "lm_head.weight": "float32[2x2]:ff"}]))
    assert "tensor lm_head.weight arrived as float32[2x2]:ff, the learner holds float32[2x2]:02" in text


def test_a_tensor_under_a_wrong_label_is_missed_and_noticed() -> None:
    wrong = {"model.embed.weight": DIGESTS["model.embed.weight"], "lm_haed.weight": DIGESTS["lm_head.weight"]}
    text = complaint(replace(LEARNER, digests=[wrong]))
    assert "tensor lm_head.weight never arrived" in text
    assert "tensor lm_haed.weight arrived but the learner does not hold it" in text


def test_two_tensors_that_changed_places_are_both_named() -> None:
    first, second = DIGESTS
    text = complaint(replace(LEARNER, digests=[{first: DIGESTS[second], second: DIGESTS[first]}]))
    assert f"tensor {first} arrived as" in text
    assert f"tensor {second} arrived as" in text


@pytest.mark.parametrize("version", [0, 6, 8])
def test_another_version_is_refused_even_if_all_tensors_agree(version: int) -> None:
    text = complaint(replace(LEARNER, version=version))
    assert f"engine 0: reports weight version {version}, the learner published 7" in text


@pytest.mark.parametrize(("gap", "limit"), [(0.02, "0.02 at most (limit 0.01)"), (0.006, "0.0012 nats on average")])
def test_a_probe_gap_with_agreeing_checksums_says_that_the_weights_are_not_in_use(gap: float, limit: str) -> None:
    text = complaint(shifted(gap))
    assert "checksums agree, but probe log-probs differ" in text
    assert limit in text
    assert "the weights arrived and are not in use" in text


@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["engine", "learner", "both"])
def test_a_probe_that_is_not_finite_is_never_accepted(value: float, side: str) -> None:
    broken = replace(LEARNER, probe_logprobs=[[0.0, value, -2.0], [0.0, -3.0]])
    learner, engine = {"engine": (LEARNER, broken), "learner": (broken, LEARNER), "both": (broken, broken)}[side]
    assert "checksums agree, but probe log-probs differ" in complaint(engine, learner=learner)


def test_a_wrong_tensor_explains_a_wrong_probe() -> None:
    text = complaint(replace(shifted(5.0), digests=[{**DIGESTS, "lm_head.weight": "other"}]))
    assert "probe" not in text


def test_the_tensor_parallel_worker_that_differs_is_named() -> None:
    text = complaint(replace(LEARNER, digests=[DIGESTS, {**DIGESTS, "lm_head.weight": "other"}]))
    assert text.count("tensor lm_head.weight") == 1
    assert text.endswith("(tensor-parallel worker 1)")


def test_a_learner_that_sent_nothing_is_not_proof_of_anything() -> None:
    nothing = replace(LEARNER, digests=[{}])
    assert "was sent nothing" in complaint(nothing, learner=nothing)


def test_complaints_of_all_engines_are_told_at_once_and_long_lists_are_cut() -> None:
    many = {f"layer.{i:02d}": "x" for i in range(30)}
    learner = replace(LEARNER, digests=[many])
    text = complaint(replace(learner, digests=[{}]), replace(learner, version=1), learner=learner)
    assert text.count("never arrived") == 8
    assert "engine 0: and 22 more tensors" in text
    assert "engine 1: reports weight version 1" in text


@pytest.mark.parametrize(
    ("learner", "engine", "gap"),
    [
        ([[0.0, -1.0]], [[0.0, -1.5]], (0.25, 0.5)),
        ([[0.0], [-1.0, -2.0, -3.0]], [[0.0], [-1.0, -2.0, -1.0]], (0.5, 2.0)),
    ],
)
def test_the_gap_is_over_tokens_not_over_sequences(
    learner: Sequence[Sequence[float]], engine: Sequence[Sequence[float]], gap: tuple[float, float]
) -> None:
    assert probe_gap(learner, engine) == gap


@pytest.mark.parametrize("engine", [[[0.0, -1.0, -2.0]], [[0.0, -1.0], [0.0, -3.0]]])
def test_probes_of_different_length_cannot_be_compared(engine: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"shorter|broadcast"):
        probe_gap(LEARNER.probe_logprobs, engine)


def test_evidence_is_frozen() -> None:
    evidence: Any = LEARNER
    with pytest.raises(AttributeError):
        evidence.version = 8
    assert isinstance(LEARNER.digests[0], Mapping)

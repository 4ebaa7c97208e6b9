"""Proof that every engine serves the learner's weights: checksums of what arrived, log-probs of what it computes.

Checksums name the tensor that was lost or changed on the way. They cannot see a fault after arrival (a tensor loaded to
the wrong place, a tied head left old), which shows in the log-probs of a fixed probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.errors import AttestationError

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one side shows: version, digests by tensor name for each worker, probe log-probs (one array a sequence)."""

    version: int
    digests: Sequence[Mapping[str, str]]
    probe_logprobs: Sequence[Sequence[float]]


def attest(learner: Evidence, engines: Sequence[Evidence], limits: tuple[float, float]) -> tuple[float, float]:
    """Largest (mean, maximum) absolute log-prob gap over the engines, in nats.

    Raises AttestationError, with every engine's complaint, when a version, a tensor or the probe differs beyond
    `limits` (mean, maximum).
    """
    problems: list[str] = []
    gaps = [(0.0, 0.0)]
    for number, engine in enumerate(engines):
        found = list(_version_problems(learner, engine)) + list(_tensor_problems(learner, engine))
        gap = probe_gap(learner.probe_logprobs, engine.probe_logprobs)
        gaps.append(gap)
        # A wrong tensor explains a wrong probe; the probe is the witness when the checksums have nothing to say.
        if not found and (gap[0] > limits[0] or gap[1] > limits[1] or not np.isfinite(gap[1])):
            found.append(
                f"checksums agree, but probe log-probs differ by {gap[0]:.3g} nats on average (limit {limits[0]:.3g}) "
                f"and {gap[1]:.3g} at most (limit {limits[1]:.3g}): the weights arrived and are not in use"
            )
        if len(found) > _SHOWN:
            found = [*found[:_SHOWN], f"and {len(found) - _SHOWN} more tensors"]
        problems += [f"engine {number}: {text}" for text in found]
    if problems:
        heading = f"weight version {learner.version} was not committed: an engine does not hold the learner's weights"
        raise AttestationError("\n".join([heading, *(f"  - {p}" for p in problems)]))
    return max(mean for mean, _ in gaps), max(largest for _, largest in gaps)


def probe_gap(learner: Sequence[Sequence[float]], engine: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(mean, maximum) of |learner - engine| over all probe tokens, in nats."""
    differences = np.concatenate([np.abs(np.subtract(a, b)) for a, b in zip(learner, engine, strict=True)])
    return float(differences.mean()), float(differences.max())


def _version_problems(learner: Evidence, engine: Evidence) -> Iterator[str]:
    if engine.version != learner.version:
        yield f"reports weight version {engine.version}, the learner published {learner.version}"


def _tensor_problems(learner: Evidence, engine: Evidence) -> Iterator[str]:
    [expected] = learner.digests
    if not expected:
        yield "was sent nothing: the transport has not read the learner's weights"
    for worker, received in enumerate(engine.digests):
        where = f" (tensor-parallel worker {worker})" if len(engine.digests) > 1 else ""
        for name, digest in expected.items():
            if name not in received:
                yield f"tensor {name} never arrived{where}"
            elif received[name] != digest:
                yield f"tensor {name} arrived as {received[name]}, the learner holds {digest}{where}"
        for name in sorted(received.keys() - expected.keys()):
            yield f"tensor {name} arrived but the learner does not hold it{where}"

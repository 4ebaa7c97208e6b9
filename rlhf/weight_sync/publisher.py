"""One weight sync: pause, send, resume, attest. A version counts only when this returns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rlhf.protocols import SyncReport
from rlhf.weight_sync.attestation import Evidence, attest

Probe = Sequence[Sequence[int]]


class WeightSender(Protocol):
    """The learner's side."""

    def send_weights(self, version: int) -> int:
        """Send all weights to all engines as `version`; returns the bytes sent to each."""
        ...

    def evidence(self, version: int, probe: Probe) -> Evidence: ...


class WeightReceivers(Protocol):
    """All engines."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def evidence(self, probe: Probe) -> list[Evidence]: ...


class WeightPublisher:
    """Brings the learner's weights to every engine and proves it on a fixed probe of token sequences."""

    def __init__(
        self, sender: WeightSender, receivers: WeightReceivers, probe: Probe, limits: tuple[float, float]
    ) -> None:
        """`limits` are the allowed (mean, maximum) absolute log-prob gap in nats."""
        self._sender = sender
        self._receivers = receivers
        self._probe = probe
        self._limits = limits

    def publish(self, version: int) -> SyncReport:
        """Raises AttestationError when an engine does not show the learner's weights.

        Requests in flight wait while weights change and go on afterwards. The probe needs a running scheduler, so it
        comes after the resume; nothing sampled since then is used unless the attestation passes.
        """
        started = time.monotonic()
        self._receivers.pause()
        size_bytes = self._sender.send_weights(version)
        self._receivers.resume()
        learner = self._sender.evidence(version, self._probe)
        mean_gap, max_gap = attest(learner, self._receivers.evidence(self._probe), self._limits)
        return SyncReport(version, size_bytes, time.monotonic() - started, mean_gap, max_gap)

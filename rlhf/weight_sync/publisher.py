"""One weight sync: prepare while engines generate, pause, load, resume, attest. It counts only when this returns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rlhf.protocols import SyncReport
from rlhf.samples import WeightVersion
from rlhf.weight_sync.attestation import Evidence, attest

Probe = Sequence[Sequence[int]]


class WeightSender(Protocol):
    """The learner's side."""

    def prepare_weights(self, version: int) -> int:
        """Do all of a sync that engines need not wait for; returns the bytes sent to each."""
        ...

    def send_weights(self) -> None:
        """Every engine holds all prepared weights, when this returns."""
        ...

    def evidence(self, version: int, probe: Probe) -> Evidence: ...


class WeightReceivers(Protocol):
    """All engines."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def evidence(self, probe: Probe) -> list[Evidence]: ...


class WeightPublisher:
    """Brings the learner's weights to every engine and proves it on a fixed probe of token sequences.

    `version` is that of the weights which all engines have been shown to hold; nothing else counts it.
    """

    def __init__(
        self, sender: WeightSender, receivers: WeightReceivers, probe: Probe, limits: tuple[float, float]
    ) -> None:
        """`limits` are the allowed (mean, maximum) absolute log-prob gap in nats."""
        self._sender = sender
        self._receivers = receivers
        self._probe = probe
        self._limits = limits
        self.version: WeightVersion = 0

    def publish(self) -> SyncReport:
        """Make the learner's weights the next version.

        Raises AttestationError when an engine does not show them. Requests in flight wait while weights change and go
        on afterwards. The probe needs a running scheduler, so it comes after the resume; nothing sampled since then is
        used unless the attestation passes.
        """
        version, started = self.version + 1, time.monotonic()
        size_bytes = self._sender.prepare_weights(version)
        paused = time.monotonic()
        self._receivers.pause()
        self._sender.send_weights()
        self._receivers.resume()
        resumed = time.monotonic()
        learner = self._sender.evidence(version, self._probe)
        mean_gap, max_gap = attest(learner, self._receivers.evidence(self._probe), self._limits)
        self.version = version
        seconds = time.monotonic() - started
        return SyncReport(version, size_bytes, seconds, resumed - paused, mean_gap, max_gap)

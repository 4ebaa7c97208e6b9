from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf.errors import AttestationError
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.publisher import Probe, WeightPublisher

PROBE = [[1, 2, 3]]


class Both:
    """Learner and engines in one; notes the order of calls."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.learner = Evidence(5, [{"w": "a"}], [[0.0, -1.0, -2.0]])
        self.engines = [self.learner, self.learner]
        self.fail = False

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")

    def prepare_weights(self, version: int) -> int:
        self.calls.append(("prepare", version))
        return 1234

    def send_weights(self) -> None:
        self.calls.append("send")
        if self.fail:
            raise ConnectionError("engine gone")


class Learner(Both):
    def evidence(self, version: int, probe: Probe) -> Evidence:
        self.calls.append(("learner evidence", version, probe))
        return self.learner


class Receivers:
    def __init__(self, both: Both) -> None:
        self.both = both
        self.pause, self.resume = both.pause, both.resume

    def evidence(self, probe: Probe) -> list[Evidence]:
        self.both.calls.append(("engine evidence", probe))
        return self.both.engines


def publisher(learner: Learner) -> WeightPublisher:
    publisher = WeightPublisher(learner, Receivers(learner), PROBE, (1e-3, 1e-2))
    publisher.version = 4
    return publisher


def test_a_sync_prepares_before_it_pauses_sends_resumes_and_then_attests() -> None:
    learner = Learner()
    sync = publisher(learner)
    report = sync.publish()
    assert learner.calls == [
        ("prepare", 5),
        "pause",
        "send",
        "resume",
        ("learner evidence", 5, PROBE),
        ("engine evidence", PROBE),
    ]
    assert (report.version, report.size_bytes, report.probe_max_gap_nats) == (5, 1234, 0.0)
    assert 0 <= report.pause_s <= report.seconds < 5
    assert sync.version == 5


def test_the_report_has_the_gap_of_the_worst_engine() -> None:
    learner = Learner()
    learner.engines = [learner.learner, replace(learner.learner, probe_logprobs=[[0.0, -1.0, -2.0015]])]
    report = publisher(learner).publish()
    assert report.probe_max_gap_nats == pytest.approx(0.0015)
    assert report.probe_mean_gap_nats == pytest.approx(0.0005)


def test_a_version_that_an_engine_does_not_hold_is_not_committed() -> None:
    learner = Learner()
    learner.engines = [learner.learner, replace(learner.learner, version=4)]
    sync = publisher(learner)
    with pytest.raises(AttestationError, match="engine 1: reports weight version 4, the learner published 5"):
        sync.publish()
    assert sync.version == 4


def test_a_transport_that_fails_leaves_the_engines_paused_so_that_none_serves_half_an_update() -> None:
    learner = Learner()
    learner.fail = True
    with pytest.raises(ConnectionError, match="engine gone"):
        publisher(learner).publish()
    assert learner.calls == [("prepare", 5), "pause", "send"]

"""A real vLLM engine and a real DeepSpeed ZeRO-3 learner in one process: honest syncs pass, sabotage is named."""

import asyncio
import os
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from rlhf.algorithms import build
from rlhf.batches.packing import Share
from rlhf.batches.ragged import supervised_sequences
from rlhf.config import AlgorithmConfig, RunConfig
from rlhf.errors import AttestationError
from rlhf.models import prepare_model
from rlhf.protocols import StageSetup
from rlhf.samples import TokenizedExample
from rlhf.training.deepspeed_engine import environment as learner_environment
from rlhf.training.rank import LoadedRank, join
from rlhf.vllm_environment import vllm_environment
from rlhf.weight_sync.attestation import Evidence
from rlhf.weight_sync.publisher import WeightPublisher
from rlhf.weight_sync.transports import RayTransport, free_port, open_transport
from rollouts.engine import AbortedError, Sampling
from rollouts.vllm_engine import VllmEngine, engine_settings

pytestmark = pytest.mark.integration

PROBE = [[20 + (7 * i + 13 * j) % 200 for i in range(24)] for j in range(3)]


class InProcessEngine:
    """Control calls of the sync, made on one engine whose event loop runs in a thread of its own."""

    def __init__(self, make_engine) -> None:
        self.version = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def make():
            return make_engine()

        self.engine = self.do(make())

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=120)

    def init_weight_transfer_engine(self, init_info):
        self.do(self.engine.init_weight_transfer(init_info))

    def stage_weights(self, number, tensors):
        self.do(self.engine.stage_weights(self.version, number, tensors))

    def wait_until_staged(self):
        pass

    def load_staged_weights(self):
        self.do(self.engine.load_staged_weights(self.version))

    def pause(self):
        self.do(self.engine.pause(True))

    def resume(self):
        self.do(self.engine.resume())

    def evidence(self, probe):
        values = [self.do(self.engine.prompt_logprobs(tokens)) for tokens in probe]
        return [Evidence(self.do(self.engine.weight_version()), self.do(self.engine.weight_digests()), values)]


class Stack:
    """Learner and engine over the same tiny model, connected by a transport that a test may replace."""

    def __init__(self, directory: Path, tied: bool) -> None:
        self.config = run_config(tied)
        model = prepare_model(self.config.model, 0, directory / "model")
        settings = engine_settings(self.config)
        self.client = InProcessEngine(lambda: VllmEngine(str(model), settings, "ray", 0))
        if not torch.distributed.is_initialized():
            join(0, self.config, "127.0.0.1", free_port())
        self.rank = LoadedRank(0, self.config, model)
        self.sender = self.rank.connect(self.client)
        self.algorithm = build("sft", {})
        optimizer = self.config.stages["sft"].optimizer
        self.stage = self.rank.begin_stage(StageSetup(model, optimizer, 100, AlgorithmConfig(name="sft")))
        self.publisher = WeightPublisher(self.sender, self.client, PROBE, self.config.attestation_limits)

    @property
    def version(self) -> int:
        return self.publisher.version

    def train(self) -> None:
        """One large optimiser step, so that old and new weights cannot be mistaken for one another."""
        token_ids = torch.arange(20, 60).numpy().astype("int32")
        example = TokenizedExample(token_ids, token_ids > 25)
        batch = supervised_sequences([example], self.algorithm.sample_weights)
        self.stage.learner.update(Share(batch, (1,)))

    def publish(self, transport=None):
        if transport is not None:
            self.sender.transport = transport(self.client, self.sender.source, 0, self.config)
        return self.publisher.publish()

    def honest(self):
        return self.publish(open_transport)

    def sampled(self, **settings):
        sampling = Sampling(temperature=1.0, **settings)
        return self.client.do(self.client.engine.generate("group", PROBE[0], sampling, ()))


def run_config(tied: bool) -> RunConfig:
    return RunConfig.model_validate(
        {
            "experiment": "sync",
            "model": {"kind": "exaone4_tiny", "max_context_tokens": 128, "tie_word_embeddings": tied},
            "data": {"train": {"kind": "procedural"}, "evaluation": {"kind": "procedural"}},
            "stages": {"sft": {"kind": "sft", "steps": 100, "optimizer": {"learning_rate": 0.01}}},
            "algorithm": {"name": "grpo_icepop"},
            "rewards": {"components": {"math": {}}},
            "training": {"ranks": 1, "zero_stage": 3},
        }
    )


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def stack(request, tmp_path_factory):
    os.environ.update(vllm_environment("cpu", 1) | learner_environment("cpu", 1))
    stack = Stack(tmp_path_factory.mktemp("sync"), request.param)
    yield stack
    stack.rank.close()
    stack.client.do(stack.client.engine.shutdown())


class SkipsOneTensor(RayTransport):
    def packed(self, tensors):
        return super().packed({k: v for k, v in tensors.items() if k != "model.layers.1.mlp.down_proj.weight"})


class AltersOneElement(RayTransport):
    def packed(self, tensors):
        name = "model.layers.2.self_attn.o_proj.weight"
        if name in tensors:
            altered = tensors[name].clone()
            altered[3, 5] += 1e-3
            tensors = {**tensors, name: altered}
        return super().packed(tensors)


class SendsAnOldVersion(RayTransport):
    old: ClassVar[dict[str, torch.Tensor]] = {}

    def packed(self, tensors):
        return super().packed({name: self.old[name] for name in tensors})


def test_every_honest_sync_is_committed_and_agrees_to_float_precision(stack):
    for _ in range(3):
        stack.train()
        report = stack.honest()
        assert report.version == stack.version
        assert report.probe_mean_gap_nats < 1e-5
        assert report.probe_max_gap_nats < 1e-3


def test_sampled_logprobs_agree_with_the_learner_after_a_sync(stack):
    stack.train()
    stack.honest()
    completions = stack.sampled(samples=8, max_tokens=40)
    sequences = [PROBE[0] + completion.token_ids.tolist() for completion in completions]
    learner = stack.sender.evidence(stack.version, sequences).probe_logprobs
    gaps = [
        abs(a - b)
        for values, completion in zip(learner, completions, strict=True)
        for a, b in zip(values[len(PROBE[0]) :], completion.logprobs, strict=True)
    ]
    assert len(gaps) == 8 * 40
    assert sum(gaps) / len(gaps) < 1e-5
    assert max(gaps) < 1e-3
    assert {span.version for c in completions for span in c.version_spans} == {stack.version}


def test_generation_goes_on_while_weights_are_staged_and_pauses_only_to_load_them(stack):
    """Old weights sample until the pause: what was staged for the next version is in no one's way."""
    stack.train()
    stack.honest()
    stack.train()
    before = stack.version
    stack.sender.prepare_weights(before + 1)
    completions = stack.sampled(samples=2, max_tokens=8)
    assert {span.version for c in completions for span in c.version_spans} == {before}
    report = stack.honest()
    assert (report.version, report.probe_mean_gap_nats < 1e-5) == (before + 1, True)
    assert 0 < report.pause_s < report.seconds


def test_an_aborted_request_ends_with_the_number_of_its_tokens_and_others_go_on(stack):
    engine = stack.client.engine

    async def both():
        sampling = Sampling(samples=2, max_tokens=100, temperature=1.0)
        long = asyncio.create_task(engine.generate("long", PROBE[0], sampling, ()))
        other = asyncio.create_task(engine.generate("other", PROBE[1], sampling, ()))
        seen = [engine.stats()]
        while seen[-1].running < 4:
            await asyncio.sleep(0.005)
            seen.append(engine.stats())
        assert sum(one.prefix_queries for one in seen) > 0
        await engine.abort("long")
        with pytest.raises(AbortedError) as aborted:
            await long
        return aborted.value.completion_tokens, await other

    tokens, completions = stack.client.do(both())
    assert 2 <= tokens < 200
    assert [len(one.token_ids) for one in completions] == [100, 100]


def test_a_skipped_tensor_is_named(stack):
    stack.train()
    with pytest.raises(
        AttestationError, match=r"engine 0: tensor model\.layers\.1\.mlp\.down_proj\.weight never arrived"
    ):
        stack.publish(SkipsOneTensor)
    stack.honest()


def test_a_tensor_with_one_altered_element_is_named(stack):
    stack.train()
    with pytest.raises(
        AttestationError, match=r"engine 0: tensor model\.layers\.2\.self_attn\.o_proj\.weight arrived as"
    ):
        stack.publish(AltersOneElement)
    stack.honest()


def test_an_old_version_under_a_new_label_is_refused(stack):
    SendsAnOldVersion.old = {name: tensor.clone() for name, tensor in stack.sender.source}
    stack.train()
    with pytest.raises(AttestationError, match="arrived as"):
        stack.publish(SendsAnOldVersion)
    stack.honest()


def test_weights_that_arrive_and_are_not_what_the_engine_computes_with_are_caught_by_the_probe(stack):
    class MovesOnAfterSending(RayTransport):
        """The checksums are those of what was sent; the learner then changes."""

        def send_weights(self):
            super().send_weights()
            stack.train()

    with pytest.raises(AttestationError, match="checksums agree, but probe log-probs differ"):
        stack.publish(MovesOnAfterSending)
    stack.honest()


def test_the_saved_policy_has_the_learners_exact_bits_and_loads_in_transformers(stack, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stack.train()
    stack.rank.save_policy(tmp_path / "policy")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    learner = {name: tensor.clone() for name, tensor in stack.sender.source}
    assert saved.keys() == learner.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in learner.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template

"""The data of the stages: prompts from the sources, completions from the engines, rewards from the reward workers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.config import CollectStage, FilterStage, PreferenceFile, PreferenceStage, RlStage, RunConfig, SftStage
from rlhf.ledger import Ledger
from rlhf.preferences import Selected
from rlhf.samples import PreferenceUnit, ScoredGroup, TokenizedExample
from rlhf.selection import Rejected, select
from rlhf.stages.context import StageData
from rollouts.buffer import Limits, StalenessBuffer
from rollouts.demonstrations import balanced_demonstrations, demonstrations
from rollouts.preference_data import load_preferences, read_selected, write_selected
from rollouts.prompts import PromptStream
from rollouts.rendering import Renderer
from rollouts.sampler import PromptSampler
from rollouts.sources import Sources
from rollouts.worker import GroupDispatcher, RolloutClient


class RunData(StageData):
    """The data of the stages, from the run's sources, engines and reward workers."""

    def __init__(self, config: RunConfig, sources: Sources, client: RolloutClient, renderer: Renderer) -> None:
        self._config = config
        self._sources = sources
        self._client = client
        self._renderer = renderer

    def rollouts(self, name: str, ledger: Ledger, algorithm: OnlineAlgorithm) -> StalenessBuffer:
        config, stage = self._config, self._config.stages[name]
        assert isinstance(stage, RlStage)

        def verdict(scored: ScoredGroup) -> Rejected | None:
            return select(scored, algorithm.group_filter, correct_at=config.rewards.correct_at)

        limits = Limits(
            name=name,
            prompts_per_step=stage.prompts_per_step,
            max_staleness=config.rollouts.max_staleness,
            total_groups=stage.steps * stage.prompts_per_step,
            max_dispatch_factor=config.rollouts.max_dispatch_factor,
            error_budget=config.rewards.error_budget,
            deadline_s=config.rollouts.silence_deadline_s,
        )
        mode = self._reasoning_mode(config.rollouts.reasoning_fraction)
        dispatcher = GroupDispatcher(self._client, config, mode)
        return StalenessBuffer(dispatcher, iter(self._stream(name).next, None), verdict, ledger, limits)

    def examples(self, name: str) -> Iterator[TokenizedExample]:
        stage = self._config.stages[name]
        assert isinstance(stage, SftStage)
        stream, ratio = self._stream(name), stage.reasoning_token_ratio
        if ratio is not None and self._renderer.supports_reasoning:
            return balanced_demonstrations(stream, self._renderer, window=stage.batch_size, token_ratio=ratio)
        seed = stage_seed(self._config, name)
        return demonstrations(stream, self._renderer, seed, reasoning_fraction=stage.reasoning_fraction)

    def sampled(
        self, name: str, stage: FilterStage | CollectStage, progress: Callable[[int], None]
    ) -> Iterator[ScoredGroup]:
        source, count = self._sources.of(name), self.prompt_count(name, stage)
        fraction = self._config.rollouts.reasoning_fraction
        if isinstance(stage, FilterStage):
            # In the order of the source: a filter's result names prompts by index.
            prompts = [source.prompt(index) for index in range(count)]
        else:
            stream, fraction = self._stream(name), stage.reasoning_fraction
            prompts = [stream.next() for _ in range(count)]
        sampler = PromptSampler(
            self._client, self._config, stage=name, samples=stage.samples_per_prompt, temperature=stage.temperature
        )
        mode = self._reasoning_mode(fraction)
        return sampler.sample(prompts, reasoning_mode=mode, progress=lambda so_far: progress(so_far.done))

    def prompt_count(self, name: str, stage: FilterStage | CollectStage) -> int:
        size = self._sources.of(name).size
        return stage.prompts if size is None else min(stage.prompts, size)

    def fingerprint(self, name: str) -> str:
        return self._sources.of(name).fingerprint

    def keep(self, name: str, indices: Sequence[int]) -> None:
        self._sources.narrow(name, indices)

    def write_preferences(self, path: Path, records: Sequence[Selected]) -> None:
        write_selected(path, records)

    def preferences(self, name: str, stage: PreferenceStage, collected: Path | None) -> Sequence[PreferenceUnit]:
        if collected is not None:
            return [record.unit for record in read_selected(collected)]
        assert isinstance(stage.data, PreferenceFile)
        return load_preferences(stage.data, self._renderer, stage.reasoning_mode)

    def _stream(self, name: str) -> PromptStream:
        return PromptStream(self._sources.of(name), stage_seed(self._config, name))

    def _reasoning_mode(self, fraction: float) -> Callable[[int], bool]:
        """In which mode the i-th prompt is asked."""
        available, seed = self._renderer.supports_reasoning, self._config.seed
        return lambda number: available and random.Random(f"{seed}-{number}").random() < fraction


def stage_seed(config: RunConfig, name: str) -> int:
    """Each stage walks the data in its own order."""
    return zlib.crc32(f"{config.seed}/{name}".encode())


def reasoning_modes(config: RunConfig, renderer: Renderer) -> tuple[bool, ...]:
    """The modes to evaluate, the one that RL trains first."""
    if not renderer.supports_reasoning:
        return (False,)
    return (True, False) if config.rollouts.reasoning_fraction > 0 else (False, True)

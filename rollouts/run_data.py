"""The data of the stages: prompts from the sources, completions from the engines, rewards from the reward workers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.config import CollectStage, FilterStage, PreferenceFile, PreferenceStage, RlStage, RunConfig, SftStage
from rlhf.ledger import Ledger
from rlhf.preferences import Selected
from rlhf.samples import PreferenceUnit, ScoredGroup, TokenizedExample
from rlhf.selection import Rejected, select
from rlhf.stages.context import StageData
from rollouts.buffer import Limits, StalenessBuffer
from rollouts.demonstrations import balanced_demonstrations, demonstrations
from rollouts.dispatcher import Dispatcher, TrainingRollouts
from rollouts.engine import Sampling
from rollouts.generator import GroupRequest
from rollouts.preference_data import load_preferences, read_selected, write_selected
from rollouts.prompts import PromptStream
from rollouts.rendering import Renderer
from rollouts.sampler import sample_prompts
from rollouts.sources import Sources


class RunData(StageData):
    """The data of the stages, from the run's sources, engines and reward workers."""

    def __init__(self, config: RunConfig, sources: Sources, dispatcher: Dispatcher, renderer: Renderer) -> None:
        self._config = config
        self._sources = sources
        self._dispatcher = dispatcher
        self._renderer = renderer

    def rollouts(
        self, name: str, ledger: Ledger, algorithm: OnlineAlgorithm, state: Mapping[str, Any] | None
    ) -> TrainingRollouts:
        config, stage = self._config, self._config.stages[name]
        assert isinstance(stage, RlStage)

        def verdict(scored: ScoredGroup) -> Rejected | None:
            return select(scored, algorithm.group_filter, correct_at=config.rewards.correct_at)

        rollouts = config.rollouts
        limits = Limits(
            name=name,
            prompts_per_step=stage.prompts_per_step,
            max_staleness=rollouts.max_staleness,
            pipeline_depth=rollouts.pipeline_depth or rollouts.max_staleness + 1,
            total_groups=stage.steps * stage.prompts_per_step,
            max_dispatch_factor=rollouts.max_dispatch_factor,
            error_budget=config.rewards.error_budget,
            late_groups=rollouts.late_groups,
        )
        stream, mode = self._stream(name), self._reasoning_mode(rollouts.reasoning_fraction)
        sampling = Sampling.of(config, samples=rollouts.group_size)

        def request(group_id: str, place: int) -> GroupRequest:
            return GroupRequest(group_id, stream.at(place), mode(place), sampling)

        buffer = StalenessBuffer(verdict, ledger, limits, None if state is None else state["buffer"])
        return TrainingRollouts(self._dispatcher, buffer, ledger, request, state)

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
        return sample_prompts(
            self._dispatcher,
            self._config,
            prompts,
            stage=name,
            samples=stage.samples_per_prompt,
            temperature=stage.temperature,
            reasoning_mode=self._reasoning_mode(fraction),
            progress=progress,
        )

    def prompt_count(self, name: str, stage: FilterStage | CollectStage) -> int:
        size = self._sources.of(name).size
        return stage.prompts if size is None else min(stage.prompts, size)

    def fingerprint(self, name: str) -> str:
        return self._sources.of(name).fingerprint

    def keep(self, name: str, indices: Sequence[int]) -> None:
        self._sources.narrow(name, indices)

    def write_preferences(self, path: Path, records: Sequence[Selected]) -> None:
        write_selected(path, records)

    def read_preferences(self, path: Path) -> Sequence[Selected]:
        return read_selected(path)

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

"""The data sources of a run: opened once, narrowed by filter stages, checked before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.config import PreferenceFile, PreferenceStage, RunConfig, SftStage, StageConfig
from rlhf.errors import DataError, did_you_mean
from rlhf.samples import Prompt
from rollouts.preference_data import load_preferences
from rollouts.prompts import PromptSource, SelectedPrompts, open_source
from rollouts.rendering import Renderer


class Sources:
    """Every data source of a run, opened and checked once."""

    def __init__(self, config: RunConfig) -> None:
        self.evaluation = open_source(config.data.evaluation)
        train = open_source(config.data.train)
        wanted = {name: getattr(stage, "data", None) for name, stage in config.stages.items()}
        own = {
            name: None if data is None or isinstance(stage, PreferenceStage) else open_source(data)
            for (name, data), stage in zip(wanted.items(), config.stages.values(), strict=True)
        }
        self._of_stage = {name: source or train for name, source in own.items()}
        self._narrowed: dict[str, SelectedPrompts] = {}

    def of(self, stage: str) -> PromptSource:
        """Where the prompts of `stage` come from, less those that an earlier filter stage left out."""
        source = self._of_stage[stage]
        return self._narrowed.get(source.fingerprint, source)

    def narrow(self, stage: str, indices: Sequence[int]) -> None:
        """Stages over the same data as `stage` take only its prompts at `indices` from now on."""
        narrowed = SelectedPrompts(self.of(stage), indices)
        self._narrowed[self._of_stage[stage].fingerprint] = narrowed


def check_prompts(
    config: RunConfig, renderer: Renderer, sources: Sources, held_out: Sequence[Prompt], modes: Sequence[bool]
) -> None:
    """Raises DataError for the first record that cannot be used, now and not hours into the run.

    It must fit the context, and where its completions are scored, name a reward that is configured.
    """
    for prompt in held_out:
        check_reward(config, prompt)
        for mode in modes:
            renderer.prompt(prompt, mode)
    for name, stage in config.stages.items():
        if not isinstance(stage, PreferenceStage):
            check_records(config, renderer, sources.of(name), stage, modes)
        elif isinstance(stage.data, PreferenceFile):
            load_preferences(stage.data, renderer, stage.reasoning_mode)


def check_records(
    config: RunConfig, renderer: Renderer, source: PromptSource, stage: StageConfig, modes: Sequence[bool]
) -> None:
    """`check_prompts` for all records of a finite source that `stage` takes."""
    for index in range(source.size or 0):
        if isinstance(stage, SftStage):
            for mode in modes:
                renderer.demonstration(source.demonstration(index), mode)
            continue
        prompt = source.prompt(index)
        check_reward(config, prompt)
        for mode in modes:
            renderer.prompt(prompt, mode)


def check_reward(config: RunConfig, prompt: Prompt) -> None:
    """Raises DataError when nothing would verify the answer to `prompt`."""
    components = config.rewards.components
    if prompt.reward not in components:
        hint = did_you_mean(prompt.reward, components)
        raise DataError(
            f"prompt {prompt.prompt_id}: reward = {prompt.reward}: must be one of rewards.components. It is not there. "
            f"{hint} Add it to rewards.components or correct the record."
        )

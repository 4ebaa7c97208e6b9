"""`replay`: a reward of a run again, on the very sample, with the run's own settings."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from pydantic import ConfigDict, Field, ValidationError

from rewards.cli.rows import Row
from rewards.cli.service import RowService
from rewards.servers.local import running
from rlhf.config import ClusterConfig, RewardComponent, RewardsConfig, Section, ServerConfig
from rlhf.errors import DataError, did_you_mean
from rlhf.jsonl import read
from rlhf.reward_failures import FILE_NAME
from rlhf.servers import KEY_VARIABLE, asked

SAMPLES = "samples.jsonl"
_TURN = re.compile(r"^(system|user|assistant|tool): ", re.MULTILINE)


def run(options: argparse.Namespace) -> int:
    """0 when the reward has a verdict now, 1 when it fails again. DataError when there is nothing to replay."""
    settings = _settings(options.run_dir)
    failures = _records(options.run_dir / FILE_NAME, options.sample_id)
    wanted = [record for record in failures if options.reward in (None, record["reward"])]
    if wanted:
        record = wanted[-1]
        return _replayed(settings, record["reward"], record, _failed_rows(record))
    seen = _records(options.run_dir / SAMPLES, options.sample_id)
    if not seen:
        raise DataError(_unknown(options.run_dir, options.sample_id))
    return _replayed(settings, _reward_of(settings.rewards, options), seen[-1], [_seen_row(seen[-1], options)])


# --- what the run wrote down ------------------------------------------------------------------------------------------


class Settings(Section):
    """What of a run's configuration decides about its rewards."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    rewards: RewardsConfig
    servers: dict[str, ServerConfig] = Field(default_factory=dict)
    cluster: ClusterConfig = ClusterConfig()


def _settings(run_dir: Path) -> Settings:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise DataError(f"--run {run_dir}: must be the directory of a run. It has no config.yaml. Correct the path.")
    try:
        return Settings.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValidationError) as error:
        raise DataError(f"{path}: must hold the section rewards of a run. {error}") from error


def _records(path: Path, sample_id: str) -> list[dict[str, Any]]:
    return [record for record in read(path) if record.get("sample_id") == sample_id] if path.is_file() else []


def _unknown(run_dir: Path, sample_id: str) -> str:
    files = [run_dir / name for name in (FILE_NAME, SAMPLES)]
    known = {str(record.get("sample_id")) for path in files if path.is_file() for record in read(path)}
    rule = f"must be a sample in {FILE_NAME} or {SAMPLES} of {run_dir}, which have {len(known)}"
    return f"SAMPLE_ID = {sample_id}: {rule}. {did_you_mean(sample_id, known, 'None has a name like it.')}"


def _failed_rows(record: Mapping[str, Any]) -> list[Row]:
    common = {"messages": tuple(record["messages"]), "answer": record["answer"], "metadata": record["metadata"]}
    return [
        Row(
            place=sample["sample_id"],
            completion=sample["completion"],
            truncated=sample["truncated"],
            completion_tokens=sample["completion_tokens"],
            reasoning_mode=record["reasoning_mode"],
            **common,
        )
        for sample in record["samples"]
    ]


def _seen_row(record: Mapping[str, Any], options: argparse.Namespace) -> Row:
    answer = record.get("answer", options.answer)
    if answer is None:
        reason = f"{SAMPLES} has completions without their answers"
        raise DataError(f"--answer: must be given for a sample that did not fail. {reason}. Add --answer TEXT.")
    return Row(
        place=record["sample_id"],
        messages=tuple(_messages(record["prompt"])),
        completion=record["completion"],
        answer=answer,
        metadata=record.get("metadata") or {},
        truncated=record["finish_reason"] == "length",
        reasoning_mode=record["completion"].lstrip().startswith("<think>"),
    )


def _messages(prompt: str) -> Iterable[Mapping[str, str]]:
    _, *parts = _TURN.split(prompt)
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        yield {"role": role, "content": content.removesuffix("\n")}


def _reward_of(rewards: RewardsConfig, options: argparse.Namespace) -> str:
    if options.reward is None and len(rewards.components) == 1:
        return next(iter(rewards.components))
    if options.reward in rewards.components:
        return str(options.reward)
    given, known = options.reward or "(not given)", ", ".join(rewards.components)
    raise DataError(f"--reward = {given}: must be one of {known}. This sample has no failed reward of that name.")


# --- again ------------------------------------------------------------------------------------------------------------


def _replayed(settings: Settings, name: str, record: Mapping[str, Any], rows: list[Row]) -> int:
    component = settings.rewards.components.get(name, RewardComponent(params=record.get("params", {})))
    once = component.model_copy(update={"retries": 0, "cache": False, "weight_schedule": (), "gate": None})
    config = settings.rewards.model_copy(update={"components": {name: once}, "processes": 1})
    with _servers_of(settings, config) as addressed, RowService(addressed) as service:
        results = service.judged(name, rows)
    outcome = next(result.outcome for result in results if result.row.place == record["sample_id"])
    row = next(row for row in rows if row.place == record["sample_id"])
    print(f"reward {name!r} on sample {record['sample_id']}\nprompt: {row.prompt_text}")
    print(f"completion: {row.completion!r}\nanswer: {row.answer!r}\nmetadata: {dict(row.metadata)}")
    if "message" not in record:
        print(f"from {SAMPLES}: without token count and the other samples of its group; metadata as written there")
    else:
        print(f"in the run: {record['kind']}: {record['message']}")
    print(f"now: {_said(outcome)}")
    return 1 if outcome["status"] == "error" else 0


def _said(outcome: Mapping[str, Any]) -> str:
    match outcome["status"]:
        case "value":
            return f"value {outcome['value']:g} {dict(outcome['parts']) or ''} {outcome['reason']}".strip()
        case "abstain":
            return f"abstains: {outcome['reason']}"
    error = outcome["error"]
    return f"{error['kind']}: {outcome['reason']}\n{error['traceback']}".rstrip()


@contextmanager
def _servers_of(settings: Settings, rewards: RewardsConfig) -> Iterator[RewardsConfig]:
    """The rewards with the addresses of the run's servers that they ask, which are started again for that."""
    wanted = {one.server: settings.servers[one.server] for one in asked(rewards)}
    if not wanted:
        yield rewards
        return
    print(f"starting the run's server {' and '.join(wanted)} ...", file=sys.stderr, flush=True)
    deadline_s = settings.cluster.start_deadline_s
    with TemporaryDirectory() as logs, running(wanted, settings.cluster.device, Path(logs), deadline_s) as servers:
        os.environ[KEY_VARIABLE] = servers.key
        yield servers.addressed(rewards)

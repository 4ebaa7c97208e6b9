"""What `python -m rewards` understands. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rewards.cli import catalogue, replay, score, serve, trial
from rlhf.errors import ConfigError, DataError, GroupwiseError

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a reward failed or did not pass; 2 for misuse; 130 after Ctrl-C."""
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    options = parser().parse_args(arguments)
    command: Command = options.command
    try:
        return command(options)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except GroupwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the results has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m rewards", description="The tools of reward authors; see docs/rewards.md."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _catalogue(commands)
    one = _add(commands, "score", score.run, "score the rows of a file, one JSON line for each")
    one.add_argument("name", metavar="NAME")
    one.add_argument("file", metavar="FILE.jsonl", type=Path, help="rows with prompt, completion, answer, metadata")
    one.add_argument("--output", metavar="FILE", type=Path, help="instead of standard output")
    _reward_options(one)
    tested = _add(commands, "test", trial.run, "is this reward fit to be trained against?")
    tested.add_argument("name", metavar="NAME")
    tested.add_argument(
        "--examples", metavar="FILE.jsonl", type=Path, help="rows; `expected`: number, value, abstain or error"
    )
    tested.add_argument("--correct-at", type=float, default=1.0, help="a completion is accepted from here on (1.0)")
    _reward_options(tested, processes=2)
    again = _add(commands, "replay", replay.run, "run a reward of a run again on the very sample")
    again.add_argument("sample_id", metavar="SAMPLE_ID")
    again.add_argument("--run", metavar="DIR", type=Path, required=True, dest="run_dir", help="the run directory")
    again.add_argument("--reward", metavar="NAME", help="which of several; the one that failed otherwise")
    again.add_argument("--answer", help="of a sample that did not fail: samples.jsonl does not have it")
    _serve(commands)
    return top


def _catalogue(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    every = _add(commands, "list", catalogue.list_rewards, "every reward in a line")
    one = _add(commands, "show", catalogue.show, "all about one reward")
    one.add_argument("name", metavar="NAME")
    for each in (every, one):
        _source_options(each)
    _brought_options(one)


def _serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    served = _add(commands, "serve", serve.run, "rewards over HTTP")
    served.add_argument("--rewards", required=True, metavar="NAME,...", type=lambda text: text.split(","))
    served.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine only)")
    served.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    served.add_argument("--queue", type=_count, default=4096, help="rows waiting; above it 429 (4096)")
    served.add_argument("--max-body-mib", type=_count, default=16, help="of one request; above it 413 (16)")
    served.add_argument("--shutdown-s", type=_seconds, default=30.0, help="for requests in flight at the end (30)")
    _reward_options(served)


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: Command, what: str
) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=what, description=what)
    added.set_defaults(command=command)
    return added


def _reward_options(to: argparse.ArgumentParser, processes: int = 1) -> None:
    _source_options(to)
    _brought_options(to)
    to.add_argument(
        "--params", action="append", default=[], metavar="KEY=VALUE", help="a parameter; a JSON value or text"
    )
    to.add_argument("--processes", type=_count, default=processes, help=f"grader processes ({processes})")
    to.add_argument("--deadline", type=_seconds, default=10.0, metavar="SECONDS", help="of one call (10)")
    to.add_argument(
        "--retries", type=int, choices=range(11), default=1, metavar="N", help="after a transient error (1)"
    )
    to.add_argument("--memory-limit-mib", type=_count, default=2048, help="of one grader process (2048)")


def _source_options(to: argparse.ArgumentParser) -> None:
    to.add_argument("--module", action="append", default=[], metavar="MODULE", help="module or .py file with rewards")


def _brought_options(to: argparse.ArgumentParser) -> None:
    to.add_argument("--path", metavar="FILE.py:FUNCTION", help="a function that is not registered")
    to.add_argument("--style", choices=("groupwise", "trl", "verl", "openrlhf"), help="what it was written for")
    to.add_argument("--url", help="a server instead: `python -m rewards serve`, or with --style openrlhf")
    to.add_argument("--low", type=float, help="least value of a function or server that declares none")
    to.add_argument("--high", type=float, help="greatest value")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError("must be above 0")
    return value

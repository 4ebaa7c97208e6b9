"""The tools of reward authors: list, show, score, test and replay, over real grader processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewards import registry
from rewards.cli import rows as rows_module
from rewards.cli.examples import EXAMPLES
from rewards.cli.main import main
from rewards.cli.rows import Row, grouped
from rlhf.reward_failures import RewardFailures
from rlhf.samples import RewardFailed, ScoredGroup
from tests.rewards.judge_server import Answer, Request, compares, completion, says, serving, texts_in

ROOT = Path(__file__).resolve().parents[2]

AUTHOR = """
import itertools, os, random, time
from rewards import Abstain, RewardInput, Score, TransientRewardError, reward

COUNT = itertools.count()
print("noise of the author")

@reward("mine")
def mine(sample, scale: float = 1.0):
    \"\"\"Half, or what the completion asks for. Reads `metadata.level`.

    More of it.
    \"\"\"
    print("more noise")
    if sample.final == "raise": raise KeyError("the author's own")
    if sample.final == "abstain": return Abstain("not asked")
    if sample.final == "large": return 7.0
    return Score(0.5 * scale, "half", {"part": 0.25})

@reward("share", group=True)
def share(samples): return [1 / len(samples)] * len(samples)

@reward("dice")
def dice(sample): return random.random()

@reward("stateful")
def stateful(sample): return float(next(COUNT) < 12)

@reward("fragile")
def fragile(sample): return float(int(sample.final[:3] or 0) > 0)

@reward("trusting")
def trusting(sample):
    if sample.metadata.get("level") is None: os._exit(3)
    return float(sample.final == "1")

@reward("generous")
def generous(sample): return float(sample.answer in sample.final or len(sample.final) < 4)

@reward("needy", requires=["no-such-package"])
def needy(sample, must): return 1.0
"""

THEIRS = """
def compute_score(data_source, solution_str, ground_truth, extra_info): return float(solution_str == ground_truth)
"""


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("author")
    (folder / "theirs.py").write_text(THEIRS)
    (folder / "author.py").write_text(AUTHOR)
    return str(folder / "author.py")


def row(completion: str, answer: str = "42", prompt: Any = "What is 6 times 7?", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "answer": answer, **fields}


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return str(path)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rewards", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


# --- list and show ----------------------------------------------------------------------------------------------------


def test_list_has_every_reward_with_range_kind_and_missing_packages(author: str) -> None:
    done = process("list", "--module", author)
    assert done.returncode == 0
    told = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert told["overlong"].split()[1:4] == ["[-1,", "0]", "sync"]
    assert "sync group" in told["share"]
    assert "async" in told["science"]
    assert "(needs no-such-package)" in told["needy"]
    assert "Half, or what the completion asks for." in told["mine"]
    assert "noise" not in done.stdout
    assert "noise of the author" in done.stderr


def test_show_has_docstring_parameters_metadata_place_and_a_config_that_is_valid(
    author: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = str(Path(author).with_name("theirs.py"))
    assert main(["show", "gsm", "--path", f"{theirs}:compute_score", "--style", "verl", "--high", "1"]) == 0
    page = capsys.readouterr().out
    assert "gsm: sync reward in [-inf, 1]" in page
    config = yaml.safe_load(page[page.index("rewards:\n") :])["rewards"]["components"]["gsm"]
    assert config == {
        "weight": 1.0, "applies": "routed", "path": f"{theirs}:compute_score", "style": "verl", "high": 1.0,
    }  # fmt: skip
    assert main(["show", "grounding_iou"]) == 0
    page = capsys.readouterr().out
    assert "  threshold: float | None = None" in page
    assert "reads metadata: box, coordinates, width" in page
    assert "rewards/grounding.py:" in page


def test_an_unknown_name_is_an_error_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "mat"]) == 2
    assert "Did you mean math?" in capsys.readouterr().err


# --- score ------------------------------------------------------------------------------------------------------------


def test_score_gives_every_row_its_fields_and_its_status_in_order(author: str, tmp_path: Path) -> None:
    given = [row(how, number=number) for number, how in enumerate(["x", "raise", "abstain", "large", "y\ud800"] * 3)]
    file = written(tmp_path / "rows.jsonl", given)
    done = process("score", "mine", file, "--module", author, "--params", "scale=0.5", "--processes", "2")
    assert done.returncode == 1
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["number"] for one in told] == list(range(15))
    assert [one["completion"] for one in told] == [one["completion"] for one in given]
    assert [one["status"] for one in told] == ["value", "error", "abstain", "error", "value"] * 3
    first, failed, abstained, invalid, _ = told[:5]
    assert (first["value"], first["parts"], first["reason"]) == (0.25, {"part": 0.25}, "half")
    assert first["seconds"] > 0
    assert (failed["value"], failed["error"]["kind"]) == (None, "raised")
    assert "author.py" in failed["error"]["traceback"]
    assert (abstained["value"], abstained["reason"]) == (None, "not asked")
    assert "must lie in [0, 1]" in invalid["reason"]
    assert "15 rows" in done.stderr
    assert "6 values, mean 0.25; 3 abstentions; 6 errors" in done.stderr
    assert "the author's own" in done.stderr


def test_score_takes_chat_messages_writes_a_file_and_its_output_can_be_scored_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 x 7?"}]
    file = written(tmp_path / "rows.jsonl", [row("\\boxed{42}", prompt=chat), "", row("정답은 41")])
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    assert main(["score", "math", file, "--output", str(once)]) == 0
    assert main(["score", "math", str(once), "--output", str(twice)]) == 0
    assert capsys.readouterr().out == ""
    values = [[json.loads(line)["value"] for line in path.read_text().splitlines()] for path in (once, twice)]
    assert values == [[1.0, 0.0], [1.0, 0.0]]
    assert main(["score", "math", str(once), "--output", str(once)]) == 2


def test_malformed_rows_are_all_reported_before_anything_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad: list[Any] = [row("fine"), row("x") | {"completion": 3}, "{", "[]", {"prompt": "?", "gold": "1"}]
    bad += [row("x", prompt=[{"role": "user"}]), row("x", truncated=1)]
    file = written(tmp_path / "rows.jsonl", bad)
    assert main(["score", "math", file]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert f"{file}:2: completion = 3: must be text." in told.err
    assert f"{file}:3: must be JSON." in told.err
    assert f"{file}:4: must be a JSON object." in told.err
    assert f"{file}:5: answer: must be text" in told.err
    assert "It is missing; the row has prompt, gold." in told.err
    assert f"{file}:6: prompt = [{{'role': 'user'}}]: must be text or a list of messages" in told.err
    assert f"{file}:7: truncated = 1: must be true or false." in told.err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["score", "math", "{folder}/none.jsonl"], "There is none. Correct the path."),
        (["score", "math", "{folder}/empty.jsonl"], "has no rows"),
        (["score", "maths", "{folder}/one.jsonl"], "Did you mean math?"),
        (["score", "math", "{folder}/one.jsonl", "--params", "extract=boxed"], "Did you mean extraction?"),
        (["score", "math", "{folder}/one.jsonl", "--params", "boxed"], "--params boxed: must be key=value"),
        (["score", "math", "{folder}/one.jsonl", "--style", "verl"], "--style verl: needs --path or --url"),
        (
            ["score", "gsm", "{folder}/one.jsonl", "--path", "a.py"],
            "must be package.module:function or file.py:function",
        ),
        (["score", "mine", "{folder}/one.jsonl", "--module", "no_such_module_x"], "must be importable"),
        (["score", "needy", "{folder}/one.jsonl", "--module", "{author}"], "params.must: must be given"),
        (["score", "math", "{folder}/one.jsonl", "--output", "{folder}"], "must be a file that can be written"),
    ],
)
def test_misuse_is_an_error_of_one_line_and_status_2(
    author: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    written(tmp_path / "empty.jsonl", [])
    written(tmp_path / "one.jsonl", [row("42")])
    assert main([text.format(folder=tmp_path, author=author) for text in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert problem in told.err
    assert told.err.startswith("error: ")


def test_rows_of_one_prompt_are_one_group_for_a_group_reward(
    author: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["a", "a", "a", "b", "a", "a"]
    file = written(tmp_path / "rows.jsonl", [row("x", prompt=prompt) for prompt in prompts])
    assert main(["score", "share", file, "--module", author]) == 0
    assert [one["value"] for one in lines(capsys)] == [1 / 3] * 3 + [1.0] + [0.5] * 2


def test_groups_are_bounded_and_rows_are_read_only_as_far_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_GROUP", 4)
    taken: list[int] = []

    def endless() -> Any:
        for number in range(10_000):
            taken.append(number)
            yield Row(f"row {number}", (), "x", "", {})

    groups = grouped(endless())
    assert [len(next(groups)) for _ in range(3)] == [4, 4, 4]
    assert len(taken) <= 13


def test_functions_of_other_trainers_are_scored_by_path_and_style(
    author: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "rows.jsonl", [row("42"), row("41")])
    theirs = Path(author).with_name("theirs.py")
    assert main(["score", "gsm", file, "--path", f"{theirs}:compute_score", "--style", "verl"]) == 0
    assert [one["value"] for one in lines(capsys)] == [1.0, 0.0]


def test_a_reader_that_has_seen_enough_ends_score_quietly(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [row("x" * 1000, number=number) for number in range(500)])
    command = f"{sys.executable} -m rewards score format {file} | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout)["number"] == 0
    assert "Traceback" not in done.stderr


# --- test -------------------------------------------------------------------------------------------------------------


QUICK = ["format", "language_consistency", "math", "multiple_choice"]


@pytest.mark.parametrize("name", QUICK)
def test_a_built_in_reward_is_fit_to_train_against(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", name]) == 0
    assert f"{name}: fit to train against" in capsys.readouterr().out


ASKING = ["judge", "judge_pairwise", "preference"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {*QUICK, *ASKING}))
def test_so_are_all_the_others(name: str) -> None:
    if missing := registry.lookup(name).missing_packages:
        pytest.skip(f"{', '.join(missing)} is not installed")
    assert main(["test", name]) == 0


def models(request: Request) -> Answer:
    """A judge that compares and knows why the sky is blue, and a reward model that likes length."""
    if "use_activation" in request:
        score = len(request["messages"][-1]["content"]) / 100
        return Answer(json.dumps({"data": [{"probs": [score]}]}).encode())
    if "first" not in (texts := texts_in(request)):
        return compares(request)
    good = [place for place in ("first", "second") if "short waves" in texts[place]]
    return completion(says(request, winner=good[0] if good else "tie"))


@pytest.mark.parametrize("name", ASKING)
def test_a_reward_that_asks_a_model_is_tried_with_the_one_that_is_given(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(models) as server:
        endpoint = json.dumps({"base_url": server.url, "model": "m"})
        assert main(["test", name, "--params", f"endpoint={endpoint}"]) == 0, capsys.readouterr().out
    assert f"{name}: fit to train against" in capsys.readouterr().out
    assert len(server.requests) > 10


def test_without_a_model_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "preference"]) == 2
    assert "rewards.components.preference.params.endpoint: must be given." in capsys.readouterr().err


def test_every_built_in_reward_has_examples() -> None:
    own = {name for name in registry.names() if registry.lookup(name).location.startswith(str(ROOT / "rewards"))}
    assert own == set(EXAMPLES)


FIVE = [row(f"{n}", f"{n}", f"Is it {n + 100}?", metadata={"level": 1}, expected=1) for n in range(1000, 1005)]


@pytest.mark.parametrize(
    ("name", "failing", "seen"),
    [
        ("dice", "determinism", "Seed what is random"),
        ("stateful", "concurrency", "among others 0"),
        ("fragile", "hostile completions", "ValueError"),
        ("trusting", "hostile metadata", "exit code 3"),
        ("generous", "rejects non-answers", "empty 100%"),
    ],
)
def test_what_a_policy_could_exploit_fails_with_what_to_do(
    author: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, failing: str, seen: str
) -> None:
    file = written(tmp_path / "examples.jsonl", FIVE)
    assert main(["test", name, "--module", author, "--examples", file]) == 1
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if line.startswith(failing))
    assert " FAIL " in line
    assert seen in told
    assert f"{name}: not fit to train against" in told.splitlines()[-1]


def test_an_example_that_does_not_get_what_is_expected_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "examples.jsonl", [row("42"), row("41", expected=0), row("41", expected=1)])
    assert main(["test", "math", "--examples", file]) == 1
    assert f"{file}:3: expected 1, got 0 (wrong (number): 41)" in capsys.readouterr().out


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(author: str, tmp_path: Path, make_scored: Callable[..., ScoredGroup]) -> Path:
    components: Mapping[str, Any] = {"mine": {"params": {"scale": 1.0}}, "share": {}}
    config = {"rewards": {"components": components, "modules": [author]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    failed = RewardFailed("mine", "KeyError: 'x'", "", 2, "raised")
    scored = make_scored((failed, failed), group_id="rl-7", texts=("raise", "fine"))
    RewardFailures(tmp_path).recorded(scored)
    seen = {"prompt": "system: Be brief.\nuser: 1+1?\nuser: ?", "completion": "x", "sample_id": "rl-9/0"}
    (tmp_path / "samples.jsonl").write_text(json.dumps({**seen, "finish_reason": "stop", "versions": "0"}) + "\n")
    return tmp_path


def test_a_failed_sample_fails_again_with_the_authors_traceback(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "rl-7/0", "--run", str(run_dir)]) == 1
    told = capsys.readouterr().out
    assert "in the run: raised: KeyError: 'x'" in told
    assert 'now: raised: KeyError: "the author\'s own"' in told
    assert "author.py" in told
    assert 'raise KeyError("the author\'s own")' in told


def test_a_failure_that_is_gone_says_so_with_status_0(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "rl-7/1", "--run", str(run_dir)]) == 0
    assert "now: value 0.5 {'part': 0.25} half" in capsys.readouterr().out


def test_a_sample_that_did_not_fail_is_replayed_from_the_sample_table(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "rl-9/0", "--run", str(run_dir), "--reward", "mine", "--answer", "2"]) == 0
    told = capsys.readouterr().out
    assert "prompt: Be brief.\n\n1+1?\n\n?" in told
    assert "now: value 0.5" in told


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["rl-7/3", "--run", "{run}"], "Did you mean rl-7/"),
        (["rl-9/0", "--run", "{run}", "--answer", "2"], "must be one of mine, share"),
        (["rl-9/0", "--run", "{run}", "--reward", "mine"], "--answer: must be given"),
        (["rl-9/0", "--run", "{run}/none"], "must be the directory of a run"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["replay", *(text.format(run=run_dir) for text in arguments)]) == 2
    assert problem in capsys.readouterr().err


def test_no_process_is_left(author: str, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [row("x")])
    assert process("score", "mine", file, "--module", author).returncode == 0
    mine = [path for path in Path("/proc").glob("[0-9]*/cmdline") if author.encode() in _read(path)]
    assert [path for path in mine if path.parent.name != str(os.getpid())] == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

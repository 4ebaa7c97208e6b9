"""Which reward asks which server: what is refused, what it becomes, and what it reserves."""

from __future__ import annotations

from typing import Any

from rlhf.cluster import bundles, roles
from rlhf.config import RunConfig
from rlhf.errors import ConfigError
from rlhf.plan import plan
from rlhf.servers import KEY_VARIABLE, asked, with_addresses, with_placeholders
from rlhf.validation import validate

SOURCE = {"kind": "procedural"}
STAGE = {"kind": "rl", "steps": 1, "prompts_per_step": 4, "optimizer": {"learning_rate": 1e-4}}
CHAT = {"kind": "chat", "model": "org/judge"}
SCORES = {"kind": "reward_model", "model": "org/scores"}


def raw(endpoint: dict[str, Any] | None = None, servers: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A run whose judge asks its own server."""
    params = {"mode": "reference", "endpoint": {"server": "judge"} if endpoint is None else endpoint}
    return {
        "experiment": "test",
        "model": {"kind": "exaone4_tiny"},
        "data": {"train": SOURCE, "evaluation": SOURCE},
        "stages": {"rl": STAGE},
        "algorithm": {"name": "grpo_icepop"},
        "rewards": {"components": {"math": {}, "judge": {"params": params}}},
        "servers": {"judge": CHAT} if servers is None else servers,
        **more,
    }


def problems(given: dict[str, Any]) -> list[str]:
    try:
        validate(given)
    except ConfigError as error:
        return error.problems
    return []


def components(**params: dict[str, Any]) -> dict[str, Any]:
    parts = {name: {"params": given} for name, given in params.items()}
    return {"components": {"math": {}, **parts}}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_judge_with_a_server_of_the_run_is_valid_and_is_written_down_as_it_was() -> None:
    config = validate(raw())
    assert config.servers["judge"].kind == "chat"
    assert validate(config.model_dump(mode="json")) == config


def test_null_in_place_of_an_address_is_no_address() -> None:
    assert problems(raw({"server": "judge", "base_url": None, "model": None, "api_key_env": None})) == []
    assert problems(raw({"server": None, "base_url": "http://h/v1", "model": "m"}, servers={})) == []


def test_a_key_that_no_server_has_is_an_error() -> None:
    assert any("servers.judge.parallel" in one for one in problems(raw(servers={"judge": {**CHAT, "parallel": 2}})))
    assert any("servers.judge.kind" in one for one in problems(raw(servers={"judge": {**CHAT, "kind": "chats"}})))


def test_a_key_among_the_flags_is_refused_and_not_shown() -> None:
    found = problems(raw(servers={"judge": {**CHAT, "args": {"api_key": "hunter2"}}}))
    assert any("servers.judge.args.api_key" in problem for problem in found)
    assert "hunter2" not in "".join(found)


def test_a_preference_asks_a_reward_model() -> None:
    rewards = components(preference={"endpoint": {"server": "scores"}})
    assert problems(raw(servers={"scores": SCORES}, rewards=rewards)) == []
    (found,) = problems(raw(servers={"scores": {**SCORES, "kind": "chat"}}, rewards=rewards))
    assert "servers.scores.kind = chat: must be reward_model" in found


def test_a_reward_of_ones_own_may_ask_any_server() -> None:
    rewards = components(
        mine={"endpoint": {"server": "scores"}}, science={"judge_params": {"endpoint": {"server": "j"}}}
    )
    rewards["components"]["mine"]["path"] = "mine.py:f"
    assert problems(raw(servers={"scores": SCORES, "j": CHAT}, rewards=rewards)) == []


# --- what it becomes --------------------------------------------------------------------------------------------------


def test_the_address_takes_the_place_of_the_name_and_the_rest_stays() -> None:
    config = RunConfig.model_validate(raw({"server": "judge", "concurrency": 3, "model": None}))
    found = with_addresses(config.rewards, config.servers, {"judge": "http://10.0.0.1:1234/v1"})
    assert found.components["judge"].params == {
        "mode": "reference",
        "endpoint": {
            "concurrency": 3,
            "base_url": "http://10.0.0.1:1234/v1",
            "model": "org/judge",
            "api_key_env": KEY_VARIABLE,
        },
    }
    assert found.components["math"] == config.rewards.components["math"]
    assert config.rewards.components["judge"].params["endpoint"]["server"] == "judge"


def test_an_endpoint_further_down_is_found_and_one_elsewhere_is_left_alone() -> None:
    elsewhere = {"base_url": "http://h/v1", "model": "m"}
    rewards = components(
        science={"judge": "rewards.judge:verdict", "judge_params": {"endpoint": {"server": "judge"}}},
        judge={"endpoint": {**elsewhere, "server": None}},
    )
    config = RunConfig.model_validate(raw(rewards=rewards))
    assert [one.key for one in asked(config.rewards)] == ["rewards.components.science.params.judge_params.endpoint"]
    found = with_placeholders(config.rewards, config.servers).components
    assert found["science"].params["judge_params"]["endpoint"]["model"] == "org/judge"
    assert found["judge"].params["endpoint"] == elsewhere


# --- what it reserves -------------------------------------------------------------------------------------------------


def test_each_server_has_a_place_of_its_own() -> None:
    servers = {"judge": {**CHAT, "cpus": 2.0, "tensor_parallel_size": 4}, "scores": SCORES}
    rewards = components(judge={"endpoint": {"server": "judge"}}, preference={"endpoint": {"server": "scores"}})
    sections: dict[str, Any] = {"servers": servers, "rewards": rewards, "cluster": {"device": "cuda"}}
    config = RunConfig.model_validate(raw(**sections))
    found = {role.name: role for role in roles(config)}
    assert (found["server-judge"].cpus, found["server-judge"].gpus) == (2.0, 4.0)
    assert (found["server-scores"].cpus, found["server-scores"].gpus) == (1.0, 1.0)
    assert len({role.bundle for role in found.values()}) == len(found) == len(bundles(config))
    rows = dict(dict(plan(config))["processes"])
    assert rows["server judge"] == "vLLM chat, org/judge, 2 CPU, 4 GPU"
    assert rows["server scores"] == "vLLM reward_model, org/scores, 1 CPU, 1 GPU"


def test_on_cpu_a_server_has_no_gpu() -> None:
    config = RunConfig.model_validate(raw())
    assert {role.name: role.gpus for role in roles(config)}["server-judge"] == 0.0

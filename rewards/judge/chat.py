"""The judge's server: /v1/chat/completions, of which exactly one finished choice is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rewards.http_endpoint import Endpoint, Usage
from rewards.judge.forms import JudgeReplyError
from rewards.judge.settings import EndpointSettings


@dataclass(frozen=True, slots=True)
class Reply:
    """The message of the one choice, and its log-probabilities as the server sent them."""

    content: str
    logprobs: Any


@dataclass
class ChatEndpoint(Endpoint):
    """`structured`: JSON by schema is asked for, until the server refuses that."""

    settings: EndpointSettings
    structured: bool = True
    who: ClassVar[str] = "judge"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.structured = self.settings.structured != "never"

    async def complete(self, body: Mapping[str, Any], deadline: float, usage: Usage) -> Reply:
        """The server's reply. Raises as `Endpoint.ask`, and JudgeReplyError for what is no chat completion."""
        return reply_of(await self.ask(body, deadline, usage))


def reply_of(completion: Any) -> Reply:
    """The one finished choice of a chat completion. Raises JudgeReplyError for anything else."""
    try:
        (choice,) = completion["choices"]
        content, finish = choice["message"]["content"], choice.get("finish_reason")
        logprobs = (choice.get("logprobs") or {}).get("content")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise JudgeReplyError("the judge's reply is no chat completion with one choice") from None
    if finish == "length":
        raise JudgeReplyError("the judge's reply was cut at endpoint.max_tokens. Raise it, or prompt.explain: false")
    if finish not in (None, "stop"):
        raise JudgeReplyError(f"the judge's reply ended with finish_reason = {str(finish)[:40]!r} instead of stop")
    if not isinstance(content, str) or not content.strip():
        raise JudgeReplyError("the judge's reply has no text")
    return Reply(content, logprobs)

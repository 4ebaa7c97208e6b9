"""One OpenAI-compatible server: bounded, retried where that helps, left alone while it is down, never over budget."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rewards.judge.forms import JudgeReplyError
from rewards.judge.settings import BudgetSettings, EndpointSettings
from rewards.registry import TransientRewardError
from rlhf.errors import GroupwiseError

if TYPE_CHECKING:
    import httpx

RETRIED = (408, 409, 429)  # and every 5xx but 501
FIXES = {401: "Check endpoint.api_key_env.", 403: "Check endpoint.api_key_env.", 404: "Check base_url and model."}
MAX_BACKOFF_S = 20.0
MAX_SHOWN_CHARS = 300
CHARS_PER_TOKEN = 3  # for servers that do not say what they used


class JudgeRefusedError(GroupwiseError):
    """The server refuses the request, and would refuse it again."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class JudgeBudgetError(GroupwiseError):
    """The calls or tokens that this process may spend are spent."""


@dataclass(slots=True)
class Usage:
    """What one verdict cost: requests sent, retries among them, and tokens."""

    calls: int = 0
    retries: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The message of the one choice, and its log-probabilities as the server sent them."""

    content: str
    logprobs: Any


class _Unavailable(Exception):
    """This attempt brought nothing and another may: why, and how long the server asks to wait."""

    def __init__(self, why: str, *, down: bool, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.down, self.wait_s = down, wait_s


class Breaker:
    """After `failures` in a row nothing is sent for `cooldown_s`; then one probe decides."""

    def __init__(self, failures: int, cooldown_s: float) -> None:
        self._limit, self._cooldown_s = failures, cooldown_s
        self._failures, self._opened_at, self._probing = 0, -math.inf, False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Round one attempt. Raises TransientRewardError, and nothing is sent, while the circuit is open."""
        probe = self._admit()
        try:
            yield
        except _Unavailable as error:
            self._failed() if error.down else self._succeeded()
            raise
        except JudgeRefusedError:
            self._succeeded()  # it answers
            raise
        else:
            self._succeeded()
        finally:
            self._probing &= not probe

    def _admit(self) -> bool:
        if self._failures < self._limit:
            return False
        left_s = self._opened_at + self._cooldown_s - time.monotonic()
        if left_s > 0 or self._probing:
            raise TransientRewardError(
                f"the judge's server failed {self._failures} times in a row: nothing is sent to it for another "
                f"{max(0.0, left_s):.1f} s (endpoint.breaker_failures, endpoint.breaker_s)"
            )
        self._probing = True
        return True

    def _failed(self) -> None:
        self._failures += 1
        if self._failures >= self._limit:
            self._opened_at = time.monotonic()

    def _succeeded(self) -> None:
        self._failures = 0


@dataclass(slots=True)
class _Connections:
    """What belongs to one event loop."""

    client: httpx.AsyncClient
    places: asyncio.Semaphore


@dataclass
class Endpoint:
    """Sends requests; `counts` has calls, retries, tokens, and attempts that failed, since the process started."""

    settings: EndpointSettings
    budget: BudgetSettings
    counts: Counter[str] = field(default_factory=Counter)
    structured: bool = True

    def __post_init__(self) -> None:
        self.structured = self.settings.structured != "never"
        self._breaker = Breaker(self.settings.breaker_failures, self.settings.breaker_s)
        self._open: dict[asyncio.AbstractEventLoop, _Connections] = {}

    async def complete(self, body: Mapping[str, Any], deadline: float, usage: Usage) -> Reply:
        """The server's reply to a chat completion, before `deadline` (of the loop's clock); adds to `usage`.

        Raises TransientRewardError when it cannot be had in time or in `retries` more attempts, JudgeRefusedError,
        JudgeReplyError for an answer that is no chat completion, JudgeBudgetError.
        """
        for attempt in range(self.settings.retries + 1):
            try:
                return await self._attempt(body, deadline, usage)
            except _Unavailable as error:
                self.counts["failed_attempts"] += 1
                await self._back_off(error, attempt, deadline)
                usage.retries += 1
                self.counts["retries"] += 1
        raise AssertionError("the last attempt returns or raises")

    async def _back_off(self, error: _Unavailable, attempt: int, deadline: float) -> None:
        """Wait before the next attempt. Raises TransientRewardError when there is none, or no time for it."""
        what = f"the judge at {self.settings.url} does not answer: {error}"
        if attempt == self.settings.retries:
            raise TransientRewardError(f"{what}. That was attempt {attempt + 1}, the last") from None
        wait_s = backoff_s(self.settings.backoff_s, attempt, error.wait_s)
        left_s = deadline - asyncio.get_running_loop().time()
        if wait_s >= left_s:
            raise TransientRewardError(
                f"{what}. The next attempt would be in {wait_s:.1f} s, and {max(0.0, left_s):.1f} s are left of "
                f"endpoint.deadline_s = {self.settings.deadline_s:g}"
            ) from None
        await asyncio.sleep(wait_s)

    async def _attempt(self, body: Mapping[str, Any], deadline: float, usage: Usage) -> Reply:
        connections = self._connections()
        try:
            async with asyncio.timeout_at(deadline):
                await connections.places.acquire()
        except TimeoutError:
            raise TransientRewardError(
                f"no place to ask the judge within endpoint.deadline_s = {self.settings.deadline_s:g}: "
                f"{self.settings.concurrency} requests are in flight (endpoint.concurrency)"
            ) from None
        try:
            self._afford()
            with self._breaker.guard():
                usage.calls += 1
                self.counts["calls"] += 1
                raw = await self._post(connections.client, body, deadline)
        finally:
            connections.places.release()
        return self._read(raw, body, usage)

    def _afford(self) -> None:
        spent = {"max_calls": self.counts["calls"], "max_tokens": self.counts["tokens"]}
        for name, amount in spent.items():
            limit = getattr(self.budget, name)
            if limit is not None and amount >= limit:
                raise JudgeBudgetError(
                    f"budget.{name} = {limit}: this process has spent {amount}. Nothing more is sent to the judge. "
                    f"Raise budget.{name}, judge fewer samples (where, gate), or set it to null"
                )

    # --- one request --------------------------------------------------------------------------------------------------

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any], deadline: float) -> bytes:
        """The body of a 200. Everything from the connection to the last byte happens in time."""
        import httpx

        now = asyncio.get_running_loop().time()
        limit_s = min(self.settings.attempt_s, deadline - now)
        try:
            async with asyncio.timeout(limit_s), client.stream("POST", self.settings.url, json=body) as response:
                raw = await self._bounded(response)
        except TimeoutError:
            raise _Unavailable(f"no complete reply within {limit_s:.1f} s", down=True) from None
        except httpx.TransportError as error:
            raise _Unavailable(self._shown(f"{type(error).__name__}: {error}"), down=True) from None
        self._check_status(response, raw)
        return raw

    async def _bounded(self, response: httpx.Response) -> bytes:
        """The body as it came over the wire: nothing is unpacked, so its size is what it claims."""
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise JudgeReplyError(f"the judge's server packs its replies ({encoding!r}) though none was asked for")
        raw = bytearray()
        async for chunk in response.aiter_raw():
            raw += chunk
            if len(raw) > self.settings.max_reply_bytes:
                raise JudgeReplyError(
                    f"the judge's reply has more than endpoint.max_reply_bytes = {self.settings.max_reply_bytes} bytes"
                )
        return bytes(raw)

    def _check_status(self, response: httpx.Response, raw: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        text = self._shown(raw.decode("utf-8", "replace"))
        if status in RETRIED or (status >= 500 and status != 501):
            wait_s = retry_after_s(response.headers.get("retry-after", ""), time.time())
            raise _Unavailable(f"HTTP {status} {text}", down=status >= 500, wait_s=wait_s)
        fix = FIXES.get(status, "Correct the endpoint's parameters.")
        raise JudgeRefusedError(f"the judge at {self.settings.url} refuses: HTTP {status} {text}. {fix}", status)

    def _read(self, raw: bytes, body: Mapping[str, Any], usage: Usage) -> Reply:
        try:
            completion = json.loads(raw)
            tokens = _tokens(completion)
        except (ValueError, RecursionError, AttributeError):
            shown = self._shown(raw.decode("utf-8", "replace"))
            raise JudgeReplyError(f"the judge's reply is no JSON object: {shown}") from None
        if tokens is None:
            tokens = math.ceil((len(json.dumps(body["messages"])) + len(raw)) / CHARS_PER_TOKEN)
        usage.tokens += tokens
        self.counts["tokens"] += tokens
        reply = reply_of(completion)
        if self.settings.api_key and self.settings.api_key in reply.content:
            raise JudgeReplyError("the judge's reply holds the API key: it is neither read nor shown")
        return reply

    def _shown(self, text: str) -> str:
        """An excerpt for a message, without the key that a server may repeat."""
        key = self.settings.api_key
        hidden = text.replace(key, "***") if key else text
        return repr(hidden[:MAX_SHOWN_CHARS])

    def _connections(self) -> _Connections:
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            # A reward that runs alone has a loop of its own, which ends with it.
            self._open = {one: kept for one, kept in self._open.items() if not one.is_closed()}
            self._open[loop] = _Connections(self._client(), asyncio.Semaphore(self.settings.concurrency))
        return self._open[loop]

    def _client(self) -> httpx.AsyncClient:
        import httpx

        key = self.settings.api_key
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_connections=self.settings.concurrency)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=None, follow_redirects=False)


# --- pure parts -------------------------------------------------------------------------------------------------------


def backoff_s(base_s: float, attempt: int, asked_s: float) -> float:
    """The wait after attempt 0, 1, ...: doubling, never less than the server asks, and never the same for all."""
    own = min(MAX_BACKOFF_S, base_s * 2.0**attempt) * random.uniform(0.5, 1.5)
    return max(own, asked_s * random.uniform(1.0, 1.1))


def retry_after_s(header: str, now: float) -> float:
    """Seconds to wait by a Retry-After header, in seconds or as a date; 0.0 when it says nothing readable."""
    try:
        wait_s = float(header)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(header).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, wait_s) if math.isfinite(wait_s) else 0.0


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


def _tokens(completion: Any) -> int | None:
    usage = completion.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    whole = isinstance(total, int) and not isinstance(total, bool) and total >= 0
    return total if whole else None

"""One HTTP server of models: bounded, retried where that helps, left alone while it is down, never over budget."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from rewards.parameter_groups import number, optional, param, text
from rewards.registry import TransientRewardError
from rlhf.errors import ConfigError, GroupwiseError

if TYPE_CHECKING:
    import httpx

E = TypeVar("E", bound="Endpoint")

RETRIED = (408, 409, 429)  # and every 5xx but 501
FIXES = {401: "Check endpoint.api_key_env.", 403: "Check endpoint.api_key_env.", 404: "Check base_url and model."}
MAX_BACKOFF_S = 20.0
MAX_SHOWN_CHARS = 300
CHARS_PER_TOKEN = 3  # for servers that do not say what they used


# --- parameters -------------------------------------------------------------------------------------------------------


def base_url(value: Any) -> str | None:
    """A rule of `parameter_groups`."""
    if not isinstance(value, str) or re.search(r"\s", value):
        return "must be a text without spaces"
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        return f"must be a URL ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "must be http://host:port/v1 or https://host/v1"
    if "@" in parts.netloc:
        return "must not hold a user or a password. URLs are logged. Name the variable of the key in api_key_env"
    return "must not have a query or a fragment" if parts.query or parts.fragment else None


@dataclass(frozen=True)
class ConnectionSettings:
    """Where a server is and how long its answers are waited for. Times are in seconds.

    `deadline_s` bounds everything done for one call of the reward: keep the component's own deadline_s above it.
    `attempt_s` bounds one request.
    """

    base_url: str = param(base_url)
    model: str = param(text)
    api_key_env: str | None = param(optional(text), None)
    concurrency: int = param(number(1, whole=True), 16)
    deadline_s: float = param(number(0.1), 60.0)
    attempt_s: float = param(number(0.1), 30.0)
    retries: int = param(number(0, 20, whole=True), 4)
    backoff_s: float = param(number(0.0), 0.5)
    breaker_failures: int = param(number(1, whole=True), 20)
    breaker_s: float = param(number(0.0), 15.0)
    max_reply_bytes: int = param(number(1024, whole=True), 1 << 20)

    @property
    def url(self) -> str:
        """What is posted to."""
        return self.base_url

    @cached_property
    def api_key(self) -> str | None:
        """The value of the variable `api_key_env`. Raises ConfigError, without the value, when it is no key."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        # A client that refuses a header quotes it.
        if not (key and key.isascii() and key.isprintable()):
            rule = "must name an environment variable that holds a key of printable ASCII characters"
            reason = "It is empty or not set" if not key else "Its value has others"
            fix = "Export it where the reward workers start."
            raise ConfigError([f"endpoint.api_key_env = {self.api_key_env!r}: {rule}. {reason}. {fix}"])
        return key

    def problems(self) -> list[str]:
        if self.attempt_s > self.deadline_s:
            rule = "must not be above endpoint.deadline_s"
            return [f"attempt_s = {self.attempt_s:g}: {rule} = {self.deadline_s:g}. It never applies. Lower it."]
        return []


@dataclass(frozen=True)
class BudgetSettings:
    """What one grader process may spend. Calls in flight are finished, so it may be passed by as many."""

    max_calls: int | None = param(optional(number(0, whole=True)), None)
    max_tokens: int | None = param(optional(number(0, whole=True)), None)


# --- errors and counts ------------------------------------------------------------------------------------------------


class EndpointRefusedError(GroupwiseError):
    """The server refuses the request, and would refuse it again."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class EndpointReplyError(GroupwiseError):
    """The server answered, but not with what it was asked for."""


class EndpointBudgetError(GroupwiseError):
    """The calls or tokens that this process may spend are spent."""


@dataclass(slots=True)
class Usage:
    """What one answer cost: requests sent, retries among them, and tokens."""

    calls: int = 0
    retries: int = 0
    tokens: int = 0

    @property
    def parts(self) -> dict[str, float]:
        return {"calls": float(self.calls), "tokens": float(self.tokens)}


class _Unavailable(Exception):
    """This attempt brought nothing and another may: why, and how long the server asks to wait."""

    def __init__(self, why: str, *, down: bool, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.down, self.wait_s = down, wait_s


# --- the client -------------------------------------------------------------------------------------------------------


class Breaker:
    """After `failures` in a row nothing is sent for `cooldown_s`; then one probe decides."""

    def __init__(self, failures: int, cooldown_s: float, who: str = "server") -> None:
        self._limit, self._cooldown_s, self._who = failures, cooldown_s, who
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
        except EndpointRefusedError:
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
                f"the {self._who} failed {self._failures} times in a row: nothing is sent to it for another "
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
    """Sends requests; `counts` has calls, retries, tokens, and attempts that failed, since the process started.

    `who` answers there, as messages name it.
    """

    settings: ConnectionSettings
    budget: BudgetSettings
    counts: Counter[str] = field(default_factory=Counter)
    who: ClassVar[str] = "server"

    def __post_init__(self) -> None:
        self._breaker = Breaker(self.settings.breaker_failures, self.settings.breaker_s, self.who)
        self._open: dict[asyncio.AbstractEventLoop, _Connections] = {}

    async def ask(self, body: Mapping[str, Any], deadline: float, usage: Usage) -> dict[str, Any]:
        """The JSON object that the server answers with, before `deadline` (of the loop's clock); adds to `usage`.

        Raises TransientRewardError when it cannot be had in time or in `retries` more attempts, EndpointRefusedError,
        EndpointReplyError for an answer that is no JSON object, EndpointBudgetError.
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
        what = f"the {self.who} at {self.settings.url} does not answer: {error}"
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

    async def _attempt(self, body: Mapping[str, Any], deadline: float, usage: Usage) -> dict[str, Any]:
        connections = self._connections()
        try:
            async with asyncio.timeout_at(deadline):
                await connections.places.acquire()
        except TimeoutError:
            raise TransientRewardError(
                f"no place to ask the {self.who} within endpoint.deadline_s = {self.settings.deadline_s:g}: "
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
                raise EndpointBudgetError(
                    f"budget.{name} = {limit}: this process has spent {amount}. Nothing more is sent to the {self.who}."
                    f" Raise budget.{name}, score fewer samples (where, gate), or set it to null"
                )

    # --- one request --------------------------------------------------------------------------------------------------

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any], deadline: float) -> bytes:
        """The body of a 200. Everything from the connection to the last byte happens in time."""
        import httpx

        now = asyncio.get_running_loop().time()
        limit_s = min(self.settings.attempt_s, deadline - now)
        try:
            sent = client.stream("POST", self.settings.url, content=encoded(body))
            async with asyncio.timeout(limit_s), sent as response:
                raw = await self._bounded(response)
        except TimeoutError:
            raise _Unavailable(f"no complete reply within {limit_s:.1f} s", down=True) from None
        except httpx.TransportError as error:
            raise _Unavailable(self._shown(f"{type(error).__name__}: {error}"), down=True) from None
        self._check_status(response, raw)
        return raw

    async def _bounded(self, response: httpx.Response) -> bytes:
        """The body as it came over the wire: nothing is unpacked, so its size is what it claims."""
        limit, encoding = self.settings.max_reply_bytes, response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise EndpointReplyError(f"the {self.who} packs its replies ({encoding!r}) though none was asked for")
        raw = bytearray()
        async for chunk in response.aiter_raw():
            raw += chunk
            if len(raw) > limit:
                rule = f"more than endpoint.max_reply_bytes = {limit} bytes"
                raise EndpointReplyError(f"the reply of the {self.who} has {rule}")
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
        raise EndpointRefusedError(
            f"the {self.who} at {self.settings.url} refuses: HTTP {status} {text}. {fix}", status
        )

    def _read(self, raw: bytes, body: Mapping[str, Any], usage: Usage) -> dict[str, Any]:
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            shown = self._shown(raw.decode("utf-8", "replace"))
            raise EndpointReplyError(f"the reply of the {self.who} is no JSON object: {shown}")
        tokens = _tokens(answer)
        if tokens is None:
            asked = json.dumps(body.get("messages", body.get("input")))
            tokens = math.ceil((len(asked) + len(raw)) / CHARS_PER_TOKEN)
        usage.tokens += tokens
        self.counts["tokens"] += tokens
        self._check_for_key(answer)
        return answer

    def _check_for_key(self, answer: Mapping[str, Any]) -> None:
        key = self.settings.api_key
        if key and json.dumps(key)[1:-1] in json.dumps(answer):
            raise EndpointReplyError(f"the reply of the {self.who} holds the API key: it is neither read nor shown")

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
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        limits = httpx.Limits(max_connections=self.settings.concurrency)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=None, follow_redirects=False)


_SHARED: dict[tuple[type[Endpoint], str], Endpoint] = {}


def shared(kind: type[E], settings: ConnectionSettings, budget: BudgetSettings) -> E:
    """The endpoint of this process for these settings: equal ones share their places, circuit and budget."""
    settings.api_key  # noqa: B018 a missing key is found here, not by the server
    endpoint = _SHARED.setdefault((kind, repr((settings, budget))), kind(settings, budget))
    assert isinstance(endpoint, kind)
    return endpoint


# --- pure parts -------------------------------------------------------------------------------------------------------


def encoded(body: Mapping[str, Any]) -> bytes:
    """The body as it is sent. Half a surrogate pair, which UTF-8 lacks, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


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


def _tokens(answer: Mapping[str, Any]) -> int | None:
    usage = answer.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    whole = isinstance(total, int) and not isinstance(total, bool) and total >= 0
    return total if whole else None

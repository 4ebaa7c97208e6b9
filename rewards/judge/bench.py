"""One judge with one way of asking: cache, then the endpoint, then the strict reading, with canaries beside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from rewards.http_endpoint import EndpointRefusedError, Usage
from rewards.judge.canaries import CanaryWatch
from rewards.judge.chat import ChatEndpoint, Reply
from rewards.judge.forms import Form, confidence
from rewards.judge.memory import VerdictCache, key_of
from rewards.judge.prompts import PromptText, Texts, unguessable
from rewards.registry import TransientRewardError
from rlhf.errors import GroupwiseError

NO_SCHEMA = (400, 404, 422, 501)  # what servers answer to a response_format that they do not know


@dataclass(frozen=True, slots=True)
class Opinion:
    """A verdict: its fields, the probability of the positive word where it is known, and what it cost."""

    fields: Mapping[str, Any]
    confidence: float | None = None
    cached: bool = False
    usage: Usage = field(default_factory=Usage)

    @property
    def parts(self) -> dict[str, float]:
        known = {} if self.confidence is None else {"confidence": self.confidence}
        return {**self.usage.parts, "cached": float(self.cached), **known}


@dataclass
class Bench:
    """Judges texts. A canary takes the place of one of `places`, and `passed(opinion, place)` if it is called good.

    `graded` is the field whose probability is wanted, "" for none.
    """

    endpoint: ChatEndpoint
    text: PromptText
    form: Form
    watch: CanaryWatch
    cache: VerdictCache
    places: tuple[str, ...]
    passed: Callable[[Opinion, str], bool]
    graded: str = ""

    def __post_init__(self) -> None:
        self._asking: dict[tuple[asyncio.AbstractEventLoop, str], _Turn] = {}

    async def opinion(self, texts: Texts, deadline: float) -> Opinion:
        """The verdict on `texts`, remembered or new. Equal questions at the same time are asked once."""
        self.watch.check()
        key = self._key(texts)
        async with self._turn(key, deadline):
            entry = self.cache.get(key)
            if entry is not None and (known := self._remembered(entry)) is not None:
                self.endpoint.counts["cache_hits"] += 1
                return known
            new = await self._beside_canary(texts, deadline)
            self.cache.put(key, {"fields": dict(new.fields), "confidence": new.confidence})
            return new

    async def asked(self, texts: Texts, deadline: float) -> Opinion:
        """A new verdict, not remembered. Raises as `ChatEndpoint.complete`, JudgeReplyError for what is no verdict."""
        usage = Usage()
        structured = self.endpoint.structured
        try:
            return await self._once(texts, structured, deadline, usage)
        except EndpointRefusedError as error:
            if not structured or self.endpoint.settings.structured != "auto" or error.status not in NO_SCHEMA:
                raise
            refused = error
        try:
            opinion = await self._once(texts, False, deadline, usage)
        except EndpointRefusedError:
            raise refused from None
        self.endpoint.structured = False
        return opinion

    async def _beside_canary(self, texts: Texts, deadline: float) -> Opinion:
        """As `asked`, with a canary beside it when one is due. Raises JudgeUnreliableError from the alarm on."""
        canary = self.watch.next(texts.get("reference", ""))
        if canary is None:
            return await self.asked(texts, deadline)
        # Both to their end: when the call fails, what the canary says of the judge is still needed.
        both = (self.asked(texts, deadline), self._send_canary(canary, texts, deadline))
        opinion, sent = await asyncio.gather(*both, return_exceptions=True)
        for result in (opinion, sent):
            if isinstance(result, BaseException):
                raise result
        self.watch.check()
        return cast(Opinion, opinion)

    async def _send_canary(self, canary: str, texts: Texts, deadline: float) -> None:
        """Have the judge see the canary instead of what it is asked about. One without a verdict is only counted."""
        place = self.places[self.endpoint.counts["canaries"] % len(self.places)]
        self.endpoint.counts["canaries"] += 1
        try:
            positive = self.passed(await self.asked({**texts, place: canary}, deadline), place)
        except GroupwiseError:
            self.endpoint.counts["canary_errors"] += 1
            return
        self.endpoint.counts["canary_false_positives"] += positive
        self.watch.saw(canary, positive)

    # --- asking -------------------------------------------------------------------------------------------------------

    async def _once(self, texts: Texts, structured: bool, deadline: float, usage: Usage) -> Opinion:
        check = unguessable(*texts.values())
        messages = self.text.messages(texts, self.form, check, structured)
        reply = await self.endpoint.complete(self._body(messages, structured), deadline, usage)
        try:
            return self._read(reply, check, structured, usage)
        except GroupwiseError:
            self.endpoint.counts["reply_errors"] += 1
            raise

    def _read(self, reply: Reply, check: str, structured: bool, usage: Usage) -> Opinion:
        verdict = self.form.parse(reply.content, check, structured)
        sure = confidence(verdict, self.form, self.graded, reply.content, reply.logprobs) if self.graded else None
        return Opinion(verdict.fields, sure, usage=usage)

    def _body(self, messages: Sequence[Mapping[str, str]], structured: bool) -> dict[str, Any]:
        body = {"model": self.endpoint.settings.model, "messages": messages, **self._sampling()}
        if structured:
            schema = {"name": "verdict", "strict": True, "schema": self.form.schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {name: value for name, value in body.items() if value is not None}

    def _sampling(self) -> dict[str, Any]:
        settings = self.endpoint.settings
        wanted = {"logprobs": True, "top_logprobs": settings.top_logprobs} if self.graded else {}
        own = {"temperature": 0, "max_tokens": settings.max_tokens, "seed": settings.seed}
        return {**own, **wanted, **settings.extra_body}

    # --- remembering --------------------------------------------------------------------------------------------------

    def _key(self, texts: Texts) -> str:
        template = [self.text.system, self.text.template, self.text.rubric]
        model = [self.endpoint.settings.model, self.endpoint.settings.structured, self._sampling()]
        return key_of(model=model, template=template, form=self.form.schema(), texts=dict(texts))

    def _remembered(self, entry: Mapping[str, Any]) -> Opinion | None:
        """The entry as an opinion; None when its file was written by something else."""
        fields, sure = entry.get("fields"), entry.get("confidence")
        if not isinstance(fields, dict) or set(fields) != set(self.form.fields):
            return None
        right = all(type(fields[name]) in (int, str) and fields[name] in self.form.fields[name] for name in fields)
        known = sure is None or (isinstance(sure, float) and 0.0 <= sure <= 1.0)
        return Opinion(fields, sure, cached=True) if right and known else None

    @asynccontextmanager
    async def _turn(self, key: str, deadline: float) -> AsyncIterator[None]:
        """One at a time for each key, so that those who wait find what the first one brought."""
        place = (asyncio.get_running_loop(), key)
        turn = self._asking.setdefault(place, _Turn())
        turn.users += 1
        try:
            await _within(turn.lock.acquire(), deadline)
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            turn.users -= 1
            if not turn.users:
                del self._asking[place]


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


async def all_of(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results. The first exception is raised as it is, when the others are cancelled and have ended."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _within(one: Coroutine[Any, Any, Any], deadline: float) -> None:
    try:
        async with asyncio.timeout_at(deadline):
            await one
    except TimeoutError:
        raise TransientRewardError("endpoint.deadline_s is over while an equal question was being asked") from None

"""`serve`: the rewards of a run over HTTP, with the same processes, deadlines, cache and metrics.

    POST /score[/NAME]       {"reward": NAME, "rows": [...]} -> {"results": [...]}; rows and results as in `score`
    POST /get_reward[/NAME]  {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}, OpenRLHF's protocol
    GET  /health             200, or 503 when a grader process fails or the server is ending
    GET  /metrics            counts and latencies of the rewards and of the server

NAME may be left out where one reward is served. 400 says what is wrong with a request, 413 that it is too large, 429
with Retry-After that too many rows wait. An error of a reward is never a 0: `score` gives each row its status, and
`get_reward`, which cannot, refuses the whole request: 503 where another attempt may end differently, else 422.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from aiohttp import web

from rewards.cli.rows import Row, row_of, row_problems
from rewards.cli.service import RowService, rewards_config
from rewards.registry import unknown_name

MAX_PROBLEMS = 20
MAX_RETRY_AFTER_S = 60
HEALTH_DEADLINE_S = 15.0


def run(options: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM, then answers what is in flight. Raises ConfigError as `Scorer` does."""
    with RowService(rewards_config(options, options.rewards)) as service:
        return asyncio.run(_serve(service, options))


async def _serve(service: RowService, options: argparse.Namespace) -> int:
    server = RewardServer(service, options.queue)
    runner = web.AppRunner(server.app(options.max_body_mib << 20), access_log=None, shutdown_timeout=options.shutdown_s)
    await runner.setup()
    site = web.TCPSite(runner, options.host, options.port)
    try:
        await site.start()
    except OSError as error:
        print(
            f"error: --port {options.port}: must be free at {options.host}. {error}. Choose another.", file=sys.stderr
        )
        await runner.cleanup()
        return 2
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    host, port = runner.addresses[0][:2]
    print(f"serving {', '.join(options.rewards)} at http://{host}:{port}", file=sys.stderr, flush=True)
    await stop.wait()
    print("ending: answering what is in flight", file=sys.stderr, flush=True)
    server.ending = True
    await runner.cleanup()
    server.close()
    return 0


class RewardServer:
    """The requests of a `RowService`. At most `queue` rows are accepted and not yet answered."""

    def __init__(self, service: RowService, queue: int) -> None:
        self._service = service
        self._queue_limit = queue
        self._rows = 0
        self._counts: Counter[str] = Counter()
        self._started = time.monotonic()
        self._threads = ThreadPoolExecutor(service.threads, thread_name_prefix="rows")
        self._doctor = ThreadPoolExecutor(1, thread_name_prefix="health")
        self.ending = False

    def app(self, max_body_bytes: int) -> web.Application:
        app = web.Application(client_max_size=max_body_bytes, middlewares=[self._errors_as_json])
        for path, handler in (("score", self._score), ("get_reward", self._get_reward)):
            app.router.add_post(f"/{path}", handler)
            app.router.add_post(f"/{path}/{{name}}", handler)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    def close(self) -> None:
        """What has not been answered in time never will be: its grader processes are killed."""
        self._service.scorer.close()
        self._threads.shutdown(cancel_futures=True)
        self._doctor.shutdown(cancel_futures=True)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _score(self, request: web.Request) -> web.Response:
        body = await _body(request)
        name = self._name(request, body.get("reward"))
        raw = body.get("rows")
        if not isinstance(raw, list) or not raw:
            raise _refused(400, ["rows: must be a list of rows that is not empty."])
        rows = _rows(raw)
        return web.json_response({"results": await self._judged(name, rows)})

    async def _get_reward(self, request: web.Request) -> web.Response:
        body = await _body(request)
        name = self._name(request, None)
        results = await self._judged(name, _openrlhf_rows(body))
        if failed := [result["error"]["kind"] for result in results if result["status"] == "error"]:
            lasting = all(kind in ("raised", "invalid") for kind in failed)
            reasons = [result["reason"] if result["status"] == "error" else "" for result in results]
            return web.json_response({"problems": reasons}, status=422 if lasting else 503)
        values = [result["value"] for result in results]  # None where it abstains
        return web.json_response({"rewards": values, "scores": values, "extra_logs": _columns(results)})

    async def _health(self, _: web.Request) -> web.Response:
        loop = asyncio.get_running_loop()
        try:
            asked = loop.run_in_executor(self._doctor, self._service.scorer.health)
            health = asdict(await asyncio.wait_for(asked, HEALTH_DEADLINE_S))
        except TimeoutError:
            health = {"failed": 1}
        status = "ending" if self.ending else "failing" if health["failed"] else "ok"
        return web.json_response({"status": status, **health}, status=200 if status == "ok" else 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        own: dict[str, float] = {f"http/{key}": count for key, count in sorted(self._counts.items())}
        own |= {"http/queue": self._rows, "http/uptime_s": round(time.monotonic() - self._started, 3)}
        return web.json_response({**self._service.scorer.metrics(), **own})

    # --- rows ---------------------------------------------------------------------------------------------------------

    async def _judged(self, name: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if len(rows) > self._queue_limit:
            raise _refused(413, [f"{len(rows)} rows: must be at most {self._queue_limit} in a request. Send fewer."])
        if self._rows + len(rows) > self._queue_limit:
            wait_s = self._wait_s(name)
            raise _refused(429, [f"{self._rows} rows wait; try again in {wait_s} s."], {"Retry-After": str(wait_s)})
        self._rows += len(rows)
        self._counts["rows"] += len(rows)
        loop = asyncio.get_running_loop()
        try:
            units = self._service.units(name, rows)
            calls = [loop.run_in_executor(self._threads, self._service.judged, name, unit) for unit in units]
            return [dict(result.outcome) for results in await asyncio.gather(*calls) for result in results]
        finally:
            self._rows -= len(rows)

    def _wait_s(self, name: str) -> int:
        """How long the rows that wait will take, judged by the latest."""
        each_s = self._service.scorer.metrics().get(f"reward_service/{name}/latency_p50_s", 1.0)
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._rows * each_s / self._service.threads)))

    def _name(self, request: web.Request, given: Any) -> str:
        names = list(self._service.config.components)
        name = request.match_info.get("name") or given or (names[0] if len(names) == 1 else None)
        if name not in names:
            raise _refused(404 if name else 400, [unknown_name("reward", str(name), names)])
        return str(name)

    @web.middleware
    async def _errors_as_json(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self._counts["requests"] += 1
        try:
            response: web.StreamResponse = await handler(request)
        except web.HTTPException as error:
            self._counts[f"status/{error.status}"] += 1
            if error.content_type == "application/json":
                raise
            headers = {key: value for key, value in error.headers.items() if key in ("Allow", "Retry-After")}
            return web.json_response({"problems": [error.text or error.reason]}, status=error.status, headers=headers)
        self._counts[f"status/{response.status}"] += 1
        return response


# --- what a request says ----------------------------------------------------------------------------------------------


async def _body(request: web.Request) -> Mapping[str, Any]:
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise _refused(400, [f"the body must be JSON. {error}."]) from error
    if not isinstance(body, dict):
        raise _refused(400, ["the body must be a JSON object."])
    return body


def _rows(raw: Sequence[Any]) -> list[Row]:
    problems = []
    for number, row in enumerate(raw):
        found = row_problems(row) if isinstance(row, dict) else ["must be an object."]
        problems += [f"rows[{number}]: {problem}" for problem in found]
    if problems:
        raise _refused(400, problems[:MAX_PROBLEMS])
    return [row_of(row, f"rows[{number}]") for number, row in enumerate(raw)]


def _openrlhf_rows(body: Mapping[str, Any]) -> list[Row]:
    columns = {key: body.get(key) for key in ("query", "prompts", "labels")}
    for key, column in columns.items():
        if not isinstance(column, list) or not all(isinstance(text, str) for text in column):
            raise _refused(400, [f"{key}: must be a list of texts."])
    if len({len(column or ()) for column in columns.values()}) > 1 or not columns["query"]:
        raise _refused(400, ["query, prompts and labels: must be equally long and not empty."])
    rows = []
    for number, (query, prompt, label) in enumerate(zip(*map(list, columns.values()), strict=True)):  # type: ignore[arg-type]
        before, found, completion = query.partition(prompt) if prompt else ("", "", query)
        if prompt and not found:
            raise _refused(
                400, [f"query[{number}]: must be the prompt and the completion. It does not hold the prompt."]
            )
        rows.append(row_of({"prompt": before + prompt, "completion": completion, "answer": label}, f"query[{number}]"))
    return rows


def _columns(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """The parts as columns, those that every row has."""
    common = set.intersection(*(set(result["parts"]) for result in results))
    return {part: [result["parts"][part] for result in results] for part in sorted(common)}


def _refused(status: int, problems: Sequence[str], headers: Mapping[str, str] | None = None) -> web.HTTPException:
    kinds: dict[int, type[web.HTTPException]] = {
        400: web.HTTPBadRequest,
        404: web.HTTPNotFound,
        429: web.HTTPTooManyRequests,
    }
    text = json.dumps({"problems": list(problems)})
    if status == 413:
        return web.HTTPRequestEntityTooLarge(0, 0, text=text, content_type="application/json")
    return kinds[status](text=text, headers=headers, content_type="application/json")

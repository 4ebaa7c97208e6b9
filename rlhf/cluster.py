"""Ray: start or join it, place the roles, wait with a name and a deadline, leave nothing behind."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf.config import RunConfig
from rlhf.errors import DeadlineError, GroupwiseError, ProcessLostError, WorkerLostError
from rlhf.runtime.session_folder import SessionFolder
from rlhf.samples import GroupTokens, TextGroup

_CAUSE_S = 5.0  # for the loss of a process to show where another reports that its connection broke
_SHUTDOWN_S = 5.0

OBJECT_STORE_ENVIRONMENT = {"RAY_max_direct_call_object_size": "8192"}
"""Results above 8 KiB stay in the object store of their node: Ray would send them to the driver up to 100 KiB."""


@dataclass(frozen=True, slots=True)
class Role:
    """One process the run starts: what Ray must reserve for it. `bundle` is its place in the placement group.

    `threads` is the size of the thread pool that its numerical libraries get.
    """

    name: str
    cpus: float
    gpus: float
    bundle: int
    threads: int = 1


def roles(config: RunConfig) -> list[Role]:
    """Every worker of the run with its share of the machine. Colocated learners and engines halve a GPU."""
    cluster, on_gpu = config.cluster, config.cluster.device == "cuda"
    share = 0.5 if cluster.placement == "colocated" else 1.0
    threads = learner_threads(config, os.cpu_count() or 1)
    learners = [
        Role(f"learner-{i}", cluster.cpus_per_learner, share * on_gpu, i, threads) for i in range(config.training.ranks)
    ]
    first = 0 if cluster.placement == "colocated" else len(learners)
    gpus = share * config.rollouts.tensor_parallel_size * on_gpu
    engines = [
        Role(f"engine-{i}", cluster.cpus_per_engine, gpus, first + i) for i in range(config.rollouts.num_engines)
    ]
    last = max(len(learners), first + len(engines))
    graders = [Role(f"reward-{i}", 1.0, 0.0, last + i) for i in range(config.rewards.workers)]
    last += len(graders)
    servers = [
        Role(f"server-{name}", server.cpus, float(server.tensor_parallel_size * on_gpu), last + i)
        for i, (name, server) in enumerate(config.servers.items())
    ]
    return [*learners, *engines, *graders, *servers]


def learner_threads(config: RunConfig, cores: int) -> int:
    """Threads of one learner rank on a machine with so many cores.

    Engines keep one thread each: generation of small batches gets slower with more. Learners of a private machine share
    all its cores, also with staleness, because engines then still wait a part of the time.
    """
    ranks, cluster = config.training.ranks, config.cluster
    if cluster.device != "cpu" or cluster.address is not None:
        return max(1, int(cluster.cpus_per_learner))
    return max(1, cores // ranks)


def bundles(config: RunConfig) -> list[dict[str, float]]:
    """What each bundle of the placement group reserves."""
    found: dict[int, dict[str, float]] = {}
    for role in roles(config):
        bundle = found.setdefault(role.bundle, {"CPU": 0.0, "GPU": 0.0})
        bundle["CPU"] += role.cpus
        bundle["GPU"] += role.gpus
    return [{key: value for key, value in found[i].items() if value} for i in sorted(found)]


class Cluster:
    """A Ray that this run started or joined, with one placement group. Use as a context: leaving it ends everything."""

    def __init__(self, config: RunConfig, run_dir: Path, *, learners_only: bool = False) -> None:
        """With `learners_only` there is room for no other role."""
        self._config = config
        # The bundles of the learners come first.
        self._bundles = bundles(config)[: config.training.ranks if learners_only else None]
        self._logs = run_dir / "logs"
        self._owned = config.cluster.address is None
        self._session: SessionFolder | None = None
        self._group: PlacementGroup | None = None

    def __enter__(self) -> Cluster:
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
            self._reserve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._group is not None and ray.is_initialized() and not self._owned:
            remove_placement_group(self._group)
        if ray.is_initialized():
            processes = [] if self._session is None else _processes_of(self._session.path)
            ray.shutdown()
            _end(processes)
        if self._session is not None:
            self._keep_ray_logs(self._session.path)
            self._session.remove()

    def options(self, role: Role, environment: dict[str, str]) -> dict[str, Any]:
        """Ray actor options for `role`, with the environment variables its process starts with."""
        # Threads that spin while they wait take the cores from the other workers.
        pool = {"OMP_NUM_THREADS": str(role.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        path = {"PYTHONPATH": os.pathsep.join(_python_path())}
        variables = {**OBJECT_STORE_ENVIRONMENT, **pool, **path, **environment}
        assert self._group is not None
        return {
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "name": role.name if self._owned else None,
            "runtime_env": {"env_vars": variables},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, role.bundle),
        }

    def _start(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if not self._owned:
            ray.init(address=self._config.cluster.address, **quiet)
            return
        # Ray lowers the priority of its workers by 15: any other program on the machine would starve the learners.
        os.environ.setdefault("RAY_worker_niceness", "0")
        self._session = SessionFolder()
        needed = sum(bundle.get("CPU", 0.0) for bundle in self._bundles)
        cores = float(os.cpu_count() or 1)
        cpus = max(cores, needed) if self._config.cluster.oversubscribe_cpus else cores
        options = {"num_cpus": int(-(-cpus // 1)), "include_dashboard": False, "_temp_dir": str(self._session.path)}
        try:
            ray.init(address="local", **options, **quiet)
        except Exception as error:
            # Ray gives its own processes 30 s, which nothing can change, and then raises a bare Exception.
            raise DeadlineError(
                f"start of Ray: it did not come up on this machine. {error} A busy machine is the usual cause: free "
                "some cores or memory and start again."
            ) from error

    def _reserve(self) -> None:
        wanted = self._bundles
        if self._owned:
            _require_this_machine(wanted)
        self._group = placement_group(wanted, strategy="PACK")
        try:
            ray.get(self._group.ready(), timeout=self._config.cluster.start_deadline_s)
        except GetTimeoutError:
            have = {key: value for key, value in ray.cluster_resources().items() if key in ("CPU", "GPU")}
            raise DeadlineError(
                f"placement: the cluster could not reserve {wanted} within {self._config.cluster.start_deadline_s} s. "
                f"It has {have}. Lower training.ranks or rollouts.num_engines, leave out servers, or add nodes."
            ) from None

    def _keep_ray_logs(self, temp_dir: Path) -> None:
        for logs in temp_dir.glob("session_2*/logs"):
            shutil.copytree(logs, self._logs / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)


def _processes_of(session: Path) -> list[psutil.Process]:
    """Ray's own processes of a session, and all workers, which descend from them."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(str(session) in argument for argument in child.cmdline()):
                found += [*child.children(recursive=True), child]
    return found


def _end(processes: Sequence[psutil.Process]) -> None:
    """Kill what Ray's shutdown has not ended: a process that hangs or is stopped does not notice it."""
    _, left = psutil.wait_procs(processes, timeout=_SHUTDOWN_S)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=_SHUTDOWN_S)


def _require_this_machine(wanted: Sequence[dict[str, float]]) -> None:
    """Raises GroupwiseError where a private Ray, which never gets another node, cannot hold what is wanted."""
    have = ray.cluster_resources()
    for kind in ("GPU", "CPU"):
        needed = sum(bundle.get(kind, 0.0) for bundle in wanted)
        if needed > have.get(kind, 0.0):
            raise GroupwiseError(
                f"placement: the run needs {needed:g} {kind}s and this machine has {have.get(kind, 0.0):g}. Lower "
                "training.ranks, rollouts.num_engines or rollouts.tensor_parallel_size, leave out servers, or join a "
                "cluster with cluster.address."
            )


def gather(references: Sequence[Any], what: str, deadline_s: float) -> list[Any]:
    """Results of all `references`, in order. The first failure is raised at once, not after the others.

    Raises DeadlineError after `deadline_s`, the worker's own GroupwiseError, or WorkerLostError with its traceback.
    """
    values: dict[Any, Any] = {}
    pending, end = list(references), time.monotonic() + deadline_s
    while pending:
        finished, pending = wait_for_any(pending, end - time.monotonic())
        if not finished:
            raise DeadlineError(
                f"{what}: {len(pending)} of {len(references)} answers missing after {deadline_s:g} s. "
                "The worker's log in logs/ shows what it was doing."
            )
        try:
            values |= {reference: result(reference, what) for reference in finished}
        except WorkerLostError:
            _raise_if_lost(pending, what)
            raise
    return [values[reference] for reference in references]


def _raise_if_lost(references: Sequence[Any], what: str) -> None:
    """Raises ProcessLostError if a process that others had to work with was lost: theirs only says that it is gone."""
    for reference in ray.wait(list(references), num_returns=len(references), timeout=_CAUSE_S)[0] if references else ():
        try:
            result(reference, what)
        except ProcessLostError:
            raise
        except GroupwiseError:
            continue


def wait_for_any(references: Sequence[Any], timeout_s: float) -> tuple[list[Any], list[Any]]:
    """(finished, still running): waits for the first to finish and takes all that have by then; none after the time."""
    done, pending = ray.wait(list(references), num_returns=1, timeout=max(0.0, timeout_s))
    if not done or not pending:
        return done, pending
    more, pending = ray.wait(pending, num_returns=len(pending), timeout=0)
    return [*done, *more], pending


def settled(references: Sequence[Any], timeout_s: float) -> None:
    """Wait for all references, whether they succeed or not: for ends, which must not hide why there is one."""
    if references:
        ray.wait(list(references), num_returns=len(references), timeout=timeout_s)


def result(reference: Any, what: str) -> Any:
    """The value of a finished reference, or the error that a user should see."""
    with explained(what):
        return ray.get(reference)


async def awaited(reference: Any, what: str) -> Any:
    """As `result`, once the reference has finished; other work of the event loop goes on meanwhile."""
    with explained(what):
        return await reference


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of Ray become those that a user should see."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, GroupwiseError):
            raise error.cause from None
        raise WorkerLostError(f"{what} failed in the worker:\n{error}") from None
    except RayError as error:  # died, ran out of memory, lost its node: Ray's message says which
        raise ProcessLostError(f"{what}: the worker process was lost.\n{error}") from None


@dataclass(frozen=True, slots=True)
class RayStored:
    """`Stored` in Ray's object store, on the node where the group was sampled.

    The references are those of a task's results, so that this process owns them: an engine's death loses nothing that
    was finished.
    """

    tokens_reference: Any
    text_reference: Any

    def tokens(self) -> GroupTokens:
        return result(self.tokens_reference, "the tokens of a group")

    def text(self) -> TextGroup:
        return result(self.text_reference, "the text of a group")


def redirect_output(path: Path) -> None:
    """From now on everything this process and its children write to stdout and stderr goes to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)


def _python_path() -> list[str]:
    """Workers import what the driver can: the checkout, and the user's own modules beside it."""
    return [str(Path(entry or ".").resolve()) for entry in sys.path if "site-packages" not in entry]

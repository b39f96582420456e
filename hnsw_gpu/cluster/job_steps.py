"""Steps of a long job (`files/step_runner.py`) as tasks of a Ray cluster.

A step leaves its result in a file and can be done again, so Ray repeats the task of a worker that
is lost. At most WINDOW tasks are submitted at a time; where one fails, or the wait is interrupted,
the others are ended before the error is raised.
"""

import contextlib
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hnsw_gpu
from hnsw_gpu import inputs
from hnsw_gpu.cluster.ray_connection import RayConnection, ends_with_last_user, ray_connection
from hnsw_gpu.engine import thread_count
from hnsw_gpu.files import Shown

WINDOW = 256  # tasks that are submitted at a time
RETRIES = 3  # of a task whose worker is lost
END_S = 10.0  # for tasks that are ended
AGAIN_S = 5  # when tasks that have not ended are cancelled once more


class StepsOnRay:
    """A StepRunner. threads: processors that a task reserves, and the threads it works with."""

    def __init__(self, connection: RayConnection, threads: int, gpus: float) -> None:
        self.threads: int | None = threads
        self._connection, self._ray, self._gpus = connection, connection.ray, gpus

    def each(
        self,
        do: Callable[..., Any],
        common: Sequence[Any],
        given: Sequence[Sequence[Any]],
        rows: Sequence[int],
        shown: Shown,
    ) -> list[Any]:
        """As of a StepRunner."""
        ray = self._ray
        task = ray.remote(_do).options(
            num_cpus=self.threads, num_gpus=self._gpus, max_retries=RETRIES, name=do.__name__
        )
        # packed by us: what fails while it is unpacked is then an error of the task as any other
        shared = ray.put((hnsw_gpu.__version__, ray.cloudpickle.dumps((do, tuple(common)))))
        results: list[Any] = [None] * len(given)
        waiting, running = deque(range(len(given))), dict[Any, int]()
        try:
            while waiting or running:
                while waiting and len(running) < WINDOW:
                    i = waiting.popleft()
                    running[task.remote(shared, *given[i])] = i
                for ended in ray.wait(list(running), num_returns=1)[0]:
                    i = running.pop(ended)
                    results[i] = self._result(ended, do.__name__)
                    shown.update(rows[i])
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray was lost: {' '.join(str(error).split())[:300]}") from None
        finally:
            self._end(list(running))
        return results

    def _result(self, ended: Any, name: str) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(ended)
        except errors.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except errors.RayError as error:
            why = " ".join(str(error).split())[:300]
            raise RuntimeError(
                f"a step ({name.strip('_')}) was lost {RETRIES + 1} times: {why}"
            ) from None

    def _end(self, running: list[Any]) -> None:
        """End tasks, and wait until they have ended."""
        if ends_with_last_user(self._connection):
            return  # and all tasks; Ray may abort where a task is cancelled as its answer comes
        until = time.monotonic() + END_S
        with contextlib.suppress(Exception):  # the cluster itself may be what was lost
            while running and time.monotonic() < until:  # again: one may have been about to begin
                for task in running:
                    with contextlib.suppress(Exception):
                        self._ray.cancel(task, force=True)
                _, running = self._ray.wait(running, num_returns=len(running), timeout=AGAIN_S)


@contextlib.contextmanager
def steps_on_ray(
    address: str | None = None, *, threads: int | None = None, gpus: float = 0
) -> Iterator[StepsOnRay]:
    """Be connected to Ray, see `ray_connection`, and do steps there.

    threads: of each task; None: 1. ValueError where no node of the cluster has what a task needs:
    Ray would wait for one.
    """
    threads = inputs.integer("threads", 1 if threads is None else threads, 1)
    with ray_connection(address, cpus=thread_count(None)) as connection:
        _require_node(connection.ray, threads, gpus)
        yield StepsOnRay(connection, threads, gpus)


def _require_node(ray: Any, threads: int, gpus: float) -> None:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for what, name, needed in (("threads", "CPU", threads), ("gpus", "GPU", gpus)):
        most = max((node.get(name, 0) for node in nodes), default=0)
        if needed > most:
            raise ValueError(f"{what}={needed}: no node of the Ray cluster has more than {most:g}")


def _do(shared: tuple[str, bytes], *given: Any) -> Any:
    """A task: the step, packed with what is common to all, of what is given to this one."""
    version, packed = shared
    if version != hnsw_gpu.__version__:
        raise RuntimeError(
            f"a node of the Ray cluster has hnsw_gpu {hnsw_gpu.__version__}, the driver {version}"
        )
    do, common = pickle.loads(packed)
    return do(*common, *given, advance=_untold)


def _untold(rows: int) -> None:
    """Progress within a task: nobody is told."""

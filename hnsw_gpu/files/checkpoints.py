"""Steps whose results lie in a work folder: a step whose file is there is not done again.

Such a file appears whole or not at all and carries checksums: it is its own mark that this step is
done. plan.json there says what the steps belong to, all that decides their result; the same plan
goes on with the steps that are left, another one is refused. It also marks the folder as ours:
without it nothing there is touched, and with it nothing but files of our own names is removed.
"""

import json
import logging
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu.files.folders import Folder, LocalFolder
from hnsw_gpu.files.storage import read_arrays, write_arrays

PLAN = "plan.json"
MOST_BYTES = 1 << 28  # of a plan; it names every input

logger = logging.getLogger("hnsw_gpu")


class Checkpoints:
    """A work folder, and the steps that are done there. A pickle of it is the same folder.

    made_by: the command that the plan names. steps: a pattern of the names of its steps' files.
    """

    def __init__(self, folder: Folder, made_by: str, steps: str) -> None:
        self._folder, self._made_by = folder, made_by
        self._begun: dict[str, Any] | None = None  # the plan
        self._step = re.compile(steps)
        self._unfinished = re.compile(rf"\.({steps}|{re.escape(PLAN)})\.[0-9a-f]{{16}}\.tmp")

    def is_begun(self) -> bool:
        """Is the folder of ours there? ValueError where one is that is not provably ours."""
        folder = self._folder
        if not folder.is_there():
            return False
        plan = self._plan()
        if plan is None and not (_is_folder(folder) and all(map(self._is_left, folder.names()))):
            raise ValueError(
                f"{folder} is there, and no plan of {self._made_by} in it: it is left as it is; "
                "move it away, or choose another output folder"
            )
        return plan is not None

    def begin(self, plan: dict[str, Any]) -> None:
        """Begin, or go on; ValueError where the folder is of another plan, or not ours."""
        self._begun = plan = json.loads(json.dumps({"made_by": self._made_by} | plan))
        if self.is_begun():
            there = self._plan() or {}
            if there != plan:
                raise ValueError(f"{self._folder} holds another run: {_difference(there, plan)}")
            return
        self._folder.make()
        self._folder.write(PLAN, json.dumps(plan, indent=1).encode())

    def require_here(self) -> None:
        """ValueError where the folder is another one than that which was begun, seen from here."""
        if self._plan() != self._begun:
            raise ValueError(
                f"{self._folder} on {socket.gethostname()} is not the folder of this run: every "
                "node has to see the same one there"
            )

    def do_once(self, step: str, do: Callable[[], dict[str, np.ndarray]]) -> None:
        """Do a step and write its arrays, unless its file is there."""
        self.require_here()
        path = self._path(step)
        if not path.exists():
            write_arrays(path, do(), {})

    def read(self, step: str, mapped: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """The arrays of a step that is done; those of `mapped` stay on disk."""
        return read_arrays(self._path(step), mapped)[0]

    @property
    def place(self) -> str:
        """The work folder, as it is called from everywhere."""
        return str(self._path("").parent.absolute())

    def identity(self, step: str) -> tuple[int, ...]:
        """What tells the file of a step from another one that was there under its name."""
        found = self._path(step).stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def remove(self) -> None:
        """Remove our files and the folder; one that holds anything else stays, and is logged."""
        for name in self._folder.names():
            if self._step.fullmatch(name) or self._is_left(name):
                self._folder.remove(name)
        self._folder.remove(PLAN)  # last: what is left after a kill is still ours
        try:
            self._folder.remove_itself()
        except OSError as error:
            logger.warning("%s is not ours alone and stays: %s", self._folder, error.strerror)

    def _path(self, step: str) -> Path:
        assert isinstance(self._folder, LocalFolder)  # only the plan lies at a URL
        return self._folder.path / f"{step}.safetensors"

    def _plan(self) -> dict[str, Any] | None:
        """The plan of ours that is in the folder."""
        try:
            plan = json.loads(self._folder.read(PLAN, MOST_BYTES).decode())
        except ConnectionError:
            raise
        except (OSError, ValueError, RecursionError):
            return None
        return plan if isinstance(plan, dict) and plan.get("made_by") == self._made_by else None

    def _is_left(self, name: str) -> bool:
        """Did a write of ours that was killed leave it?"""
        return self._unfinished.fullmatch(name) is not None


def _is_folder(folder: Folder) -> bool:
    return not isinstance(folder, LocalFolder) or folder.path.is_dir()


def _difference(there: dict[str, Any], plan: dict[str, Any]) -> str:
    """The first thing in which two plans differ, in words, and what to do."""
    if there.keys() != plan.keys():
        return "of another release; delete the folder to begin anew"
    for name in [name for name in ("files", "against") if name in plan]:
        known = {file["path"]: file for file in there[name]}
        for file in plan[name]:
            before = known.get(file["path"])
            if before is not None and before != file:
                return (
                    f"{file['path']} has changed since (checksum {file['checksum']}, then "
                    f"{before['checksum']}); delete the folder to begin anew"
                )
        if there[name] != plan[name]:
            return "of other files; delete it to begin anew"
    part = next(part for part in plan if there[part] != plan[part])
    old, new = there[part], plan[part]
    if part == "settings":
        part = next(name for name in new if old.get(name) != new[name])
        old, new = old.get(part), new[part]
    return f"{part} was {old!r}, is {new!r}; delete the folder to begin anew"

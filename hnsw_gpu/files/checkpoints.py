"""Steps whose results lie in a work folder: a step whose file is there is not done again.

Such a file appears whole or not at all and carries checksums: it is its own mark that this step is
done. plan.json there says what the steps belong to, all that decides their result; the same plan
goes on with the steps that are left, another one is refused. It also marks the folder as ours:
without it nothing there is touched, and with it nothing but files of our own names is removed.
"""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu.files.storage import atomic_file, read_arrays, write_arrays

PLAN = "plan.json"

logger = logging.getLogger("hnsw_gpu")


class Checkpoints:
    """A work folder, and the steps that are done there.

    made_by: the command that the plan names. steps: a pattern of the names of its steps' files.
    """

    def __init__(self, folder: Path, made_by: str, steps: str) -> None:
        self._folder, self._made_by = folder, made_by
        self._step = re.compile(steps)
        self._unfinished = re.compile(rf"\.({steps}|{re.escape(PLAN)})\.[0-9a-f]{{16}}\.tmp")

    def is_begun(self) -> bool:
        """Is the folder of ours there? ValueError where one is that is not provably ours."""
        folder = self._folder
        if not os.path.lexists(folder):
            return False
        plan = self._plan()
        if plan is None and not (
            folder.is_dir() and all(map(self._is_unfinished, folder.iterdir()))
        ):
            raise ValueError(
                f"{folder} is there, and no plan of {self._made_by} in it: it is left as it is; "
                "move it away, or choose another output folder"
            )
        return plan is not None

    def begin(self, plan: dict[str, Any]) -> None:
        """Begin, or go on; ValueError where the folder is of another plan, or not ours."""
        plan = json.loads(json.dumps({"made_by": self._made_by} | plan))
        if self.is_begun():
            there = self._plan() or {}
            if there != plan:
                raise ValueError(f"{self._folder} holds another run: {_difference(there, plan)}")
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._folder / PLAN) as file:
            file.write(json.dumps(plan, indent=1).encode())

    def do_once(self, step: str, do: Callable[[], dict[str, np.ndarray]]) -> None:
        """Do a step and write its arrays, unless its file is there."""
        path = self._path(step)
        if not path.exists():
            write_arrays(path, do(), {})

    def read(self, step: str, mapped: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """The arrays of a step that is done; those of `mapped` stay on disk."""
        return read_arrays(self._path(step), mapped)[0]

    def remove(self) -> None:
        """Remove our files and the folder; one that holds anything else stays, and is logged."""
        for path in list(self._folder.iterdir()):
            if self._step.fullmatch(path.name) or self._is_unfinished(path):
                path.unlink()
        (self._folder / PLAN).unlink()  # last: what is left after a kill is still ours
        try:
            self._folder.rmdir()
        except OSError as error:
            logger.warning("%s is not ours alone and stays: %s", self._folder, error.strerror)

    def _path(self, step: str) -> Path:
        return self._folder / f"{step}.safetensors"

    def _plan(self) -> dict[str, Any] | None:
        """The plan of ours that is in the folder."""
        try:
            plan = json.loads((self._folder / PLAN).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return plan if isinstance(plan, dict) and plan.get("made_by") == self._made_by else None

    def _is_unfinished(self, path: Path) -> bool:
        """Did a write of ours that was killed leave it?"""
        return self._unfinished.fullmatch(path.name) is not None


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

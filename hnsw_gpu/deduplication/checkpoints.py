"""Steps whose results lie in a work folder: a step whose file is there is not done again.

Such a file appears whole or not at all and carries checksums: it is its own mark that this step is
done. plan.json there says what the steps belong to, such as parameters and checksums of the input;
the same plan goes on with the steps that are left, another one is refused.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hnsw_gpu.files import atomic_file, read_arrays, write_arrays

PLAN = "plan.json"


class Checkpoints:
    """A work folder, and the steps that are done there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, plan: dict[str, Any]) -> None:
        """Begin, or go on; ValueError where the folder belongs to another plan."""
        path = self._folder / PLAN
        plan = json.loads(json.dumps(plan))
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            if there != plan:
                raise ValueError(f"{self._folder} holds another run: {_difference(there, plan)}")
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        with atomic_file(path) as file:
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
        (self._folder / PLAN).unlink()  # what is left without it counts for nothing
        shutil.rmtree(self._folder)

    def _path(self, step: str) -> Path:
        return self._folder / f"{step}.safetensors"


def _difference(there: dict[str, Any], plan: dict[str, Any]) -> str:
    """The first thing in which two plans differ, in words, and what to do."""
    for name in ("files", "against"):
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
    for part in ("settings", "shard_rows", "itself", "version"):
        if there[part] != plan[part]:
            old, new = there[part], plan[part]
            if part == "settings":
                part = next(name for name in new if old[name] != new[name])
                old, new = old[part], new[part]
            return f"{part} was {old!r}, is {new!r}; delete the folder to begin anew"
    return "delete it to begin anew"


def interrupted_state(out: Path) -> str:
    """How far an interrupted deduplication into OUT has come, in words."""
    work = out / "work"
    built, joined = (len(list(work.glob(f"{what}-*"))) for what in ("shard", "block"))
    return f"{built} shards built, {joined} blocks joined: the same command goes on from there"

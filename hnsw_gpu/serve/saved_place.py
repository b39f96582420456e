"""Where a saved index or a collection lies, and what lies beside it: here, or at a URL."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from hnsw_gpu.collection import is_collection
from hnsw_gpu.files import Folder, LocalFolder, RemoteFolder, folder_at

Saved: TypeAlias = Path | RemoteFolder  # a file or a folder; a folder at a URL
# What a caller may name at a URL: nothing that fsspec or a file system there would read otherwise.
PLAIN = re.compile(r"[\w.+=@ -]+(/[\w.+=@ -]+)*")


def saved_at(place: Path | str, storage_options: Mapping[str, Any] | None = None) -> Saved:
    """What lies at a path, resolved, or at a URL. Nothing at a URL is looked at yet."""
    folder = folder_at(place, storage_options)
    return folder.path.resolve() if isinstance(folder, LocalFolder) else folder


def name_within(saved: Saved, root: Saved) -> str | None:
    """The name of what lies in a folder, relative to it; None where it does not."""
    if isinstance(saved, Path) and isinstance(root, Path):
        return str(saved.relative_to(root)) if saved.is_relative_to(root) else None
    name = str(saved).removeprefix(f"{root}/")
    is_within = isinstance(root, RemoteFolder) and name != str(saved)
    return name if is_within else None


def named_within(root: Saved, name: str) -> Saved:
    """The index or collection of a name in a folder; FileNotFoundError where there is none."""
    if isinstance(root, RemoteFolder):
        is_plain = PLAIN.fullmatch(name) and not {".", ".."} & set(name.split("/"))
        if not is_plain or not is_collection(root.within(name)):
            raise FileNotFoundError(name)
        return root.within(name)
    try:
        given = os.path.join(root, name)
        os.stat(given)  # as the system sees it: neither FILE/ nor MISSING/../FILE
        path = Path(given).resolve()
    except (ValueError, OSError, RuntimeError):  # a null byte, a name too long, a loop of links
        raise FileNotFoundError(name) from None
    if not (path.is_relative_to(root) and (path.is_file() or is_collection(path))):
        raise FileNotFoundError(name)
    return path


def beside(saved: Saved, ending: str) -> tuple[Folder, str]:
    """The folder that something saved lies in, and its name there with another ending."""
    folder = LocalFolder(saved.parent) if isinstance(saved, Path) else saved.parent
    return folder, PurePosixPath(saved.name).with_suffix(ending).name


def content(folder: Folder, name: str) -> bytes:
    """The bytes of a file; ValueError for a folder, a pipe, a link that leads nowhere."""
    if isinstance(folder, LocalFolder) and not (folder.path / name).is_file():
        raise ValueError("is not a file")
    with folder.open(name) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return file.read(size)

"""Names of a package that bring their module when they are first used (PEP 562)."""

import sys
from collections.abc import Callable
from importlib import import_module


def lazy_names(package: str, homes: dict[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names live in the submodules `homes`, by name.

    A value that was brought is kept in the package, so that this runs once a name.
    """

    def bring(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return bring

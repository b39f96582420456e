"""Progress bars of long work."""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def bar(is_shown: bool, total: int | None, text: str, unit: str = "rows") -> Iterator[tqdm]:
    """A bar on stderr where that is a terminal, if one is asked for."""
    disable = None if is_shown else True  # None: hidden where there is no terminal
    with tqdm(total=total, desc=text, unit=f" {unit}", unit_scale=True, disable=disable) as shown:
        yield shown

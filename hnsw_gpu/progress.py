"""Progress bars of long work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Hidden:
    """A bar that is not drawn. tqdm's own takes a lock of all processes, drawn or not."""

    n = 0

    def update(self, n: float = 1) -> None:
        """Count as a bar does."""
        self.n += int(n)


@contextmanager
def bar(
    is_shown: bool, total: int | None, text: str, unit: str = "rows"
) -> Iterator[tqdm | Hidden]:
    """A bar on stderr where that is a terminal, if one is asked for."""
    if not is_shown or sys.stderr is None or not sys.stderr.isatty():
        yield Hidden()
        return
    with tqdm(total=total, desc=text, unit=f" {unit}", unit_scale=True) as shown:
        yield shown

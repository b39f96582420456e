"""How the command line talks: one line per error; bars and notes only on a terminal."""

import contextlib
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

INTERRUPTED = 130  # 128 + SIGINT, what a shell expects
LIBRARY_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    OSError,
    MemoryError,
    RuntimeError,
    ImportError,
    EOFError,
)


class Commands(click.Group):
    """A click group that reports the library's errors and Ctrl-C in one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            sys.exit(INTERRUPTED)
        except LIBRARY_ERRORS as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output left, as `head` does: click ends quietly
            raise click.ClickException(_one_line(error)) from None


def _one_line(error: BaseException) -> str:
    """The words of `error` without what str() puts around them: an errno, a KeyError's quotes."""
    words = str(error)
    if isinstance(error, KeyError) and error.args:
        words = str(error.args[0])
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        words = f"{error.filename}: {error.strerror}"
    return " ".join(words.split()) or type(error).__name__


def is_watched() -> bool:
    """Whether someone watches: only then are progress bars drawn."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Says on a terminal what goes on while no bar is drawn."""
    if not is_watched():
        yield
        return
    click.echo(f"{what} ... ", err=True, nl=False)
    try:
        yield
    except BaseException:
        click.echo(err=True)
        raise
    click.echo("done", err=True)


def check_output(output: Path, *inputs: Path | str | None, suffixes: tuple[str, ...] = ()) -> None:
    """Refuses before the work what could not be written after it, and to overwrite an input."""
    if not output.parent.is_dir():
        raise click.ClickException(f"the folder of {output} does not exist")
    if suffixes and output.suffix.lower() not in suffixes:
        raise click.ClickException(f"{output} does not end in {' or '.join(suffixes)}")
    for path in [given for given in inputs if isinstance(given, Path)]:
        if output.exists() and path.exists() and output.samefile(path):
            raise click.ClickException(f"{output} is an input: it would be overwritten")


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        shown = f"{value:,}" if name.endswith(("_bytes", "vectors")) else value
        for line in shown if isinstance(shown, list) else [shown]:
            is_none = line is None or line is False or line == ""  # 0 is none of them
            click.echo(f"{name:<{width}}{'none' if is_none else line}")
            name = ""

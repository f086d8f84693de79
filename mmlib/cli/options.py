"""What every command shares: the application, its errors in one line, and how arguments and options are written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

Device = StrEnum("Device", ["auto", "cpu", "cuda"])


class OneLineErrors(TyperGroup):
    """Say what went wrong in one line: status 1, or 130 for an interrupt; typer answers wrong usage, 2."""

    def invoke(self, ctx: typer.Context) -> None:
        """Run the command that was asked for."""
        try:
            super().invoke(ctx)
            print(end="", flush=True)
        except BrokenPipeError:  # whoever read the output has seen enough
            _discard_output()
        except KeyboardInterrupt:
            _stop("interrupted", 130)
        except MemoryError as error:
            _stop(f"out of memory {error}")
        except (ValueError, OSError) as error:
            _discard_output()
            _stop(_reason(error))


app = typer.Typer(
    help="Simulate or import clips, learn from scenes, predict, score a submission, rerun a chapter.",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def argument(metavar: str, text: str) -> typer.models.ArgumentInfo:
    return typer.Argument(metavar=metavar, show_default=False, help=text)


def option(text: str, *names: str, metavar: str | None = None, least: int | None = None) -> typer.models.OptionInfo:
    """Describe an option; one with a metavar or a least value of None by default shows no default."""
    return typer.Option(*names, metavar=metavar, min=least, show_default=metavar is None, help=text)


def command(*examples: str, name: str | None = None):
    """Register a command with examples below its help."""
    lines = "\n".join(f"  mmlib {example}" for example in examples)
    return app.command(name, epilog=f"\b\nExample{'s' * (len(examples) > 1)}:\n{lines}")


PAIRS = {"metavar": "NAME=VALUE"}  # of an option that may be repeated
Overwrite = Annotated[bool, option("Replace what is there once the new is complete.", "--overwrite")]
NewStore = Annotated[Path, argument("STORE", "Clip store to write, a folder.")]
Where = Annotated[Device, option("auto is a GPU where there is one.")]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Have an error of the system that names no file, such as a full disk, name `path`."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:
            error.filename = str(path)
        raise


def say(line: str) -> None:
    """Print a line on standard error at once."""
    print(line, file=sys.stderr, flush=True)


def write_store(store: Path, make: Callable, *given, **options) -> None:
    """Have ``make`` import what is given into a store, and print its report; its bars go to standard error."""
    import rich

    rich.reconfigure(stderr=True)
    with writing(store):
        report = make(*given, store, progress=sys.stderr.isatty(), **options)
    print(*report.lines(), sep="\n")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _stop(reason: str, status: int = 1) -> None:
    print("mmlib: error:", " ".join(line.strip() for line in reason.splitlines()), file=sys.stderr)
    raise typer.Exit(status) from None


def _discard_output() -> None:
    """Drop printed text that cannot be written, or Python would try once more at exit and complain."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def split_pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{option} {text}: expected NAME=VALUE")
        if name in pairs:
            raise ValueError(f"{option} {name}: given twice, {pairs[name]!r} and {value!r}")
        pairs[name] = value
    return pairs

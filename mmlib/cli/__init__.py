"""The command line: `mmlib --help`. Commands read arguments and print; the library does the work.

Modules that take long to import are imported where they are needed, so that help comes at once.
"""

import signal
import sys

from mmlib.cli import data, study  # noqa: F401, they register their commands
from mmlib.cli.options import app


def main() -> None:
    """Run the command line."""
    # how a batch system stops a run: unwind, so that nothing half-made stays
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    app(prog_name="mmlib")

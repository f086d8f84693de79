"""The command line: `mmlib --help`. Commands read arguments and print; the library does the work.

Modules that take long to import are imported where they are needed, so that help comes at once.
"""

import os
import signal
import sys
from types import FrameType

from mmlib.cli import data, study  # noqa: F401, they register their commands
from mmlib.cli.options import app


def main() -> None:
    """Run the command line, which leaves nothing half-made when a batch system stops it or its terminal closes."""
    own = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() == own:  # and not in each process that it has started
            os.write(2, f"mmlib: error: stopped by {signal.Signals(number).name}\n".encode())
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:  # as under nohup
            signal.signal(getattr(signal, name), stop)
    app(prog_name="mmlib")

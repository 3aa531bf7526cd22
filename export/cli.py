"""What every command of this package does with a user's mistake: one line on stderr, exit code 2, no traceback."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, through `run`."""

    def error(self, message: str) -> NoReturn:
        """One sentence that says where help is."""
        raise ValueError(f"{message}; see {self.prog} --help")


def run(main: Callable[[], Any]) -> None:
    """Call `main`; CAPAVISION_TRACEBACK=1 shows tracebacks all the same."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("CAPAVISION_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

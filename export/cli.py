"""What every command does with a user's mistake: one line on stderr, exit code 2, no traceback.

Standard library only: vtab.cli builds on it, and a machine that only runs packages has no torch.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

STOPPED = 130  # what shells report for Ctrl-C


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, through `run`, and that takes no shortened flags."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """One sentence that says where help is."""
        raise ValueError(f"{message}; see {self.prog} --help")


def run(main: Callable[[], Any], stopped: str = "nothing was written") -> None:
    """Call `main`; turn what a user can mend into one line on stderr and exit code 2, without a traceback.

    CAPAVISION_TRACEBACK=1 shows the traceback all the same. After Ctrl-C `stopped` says what there is.
    """
    try:
        main()
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        sys.exit(STOPPED)
    except (ValueError, OSError) as error:
        if os.environ.get("CAPAVISION_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def first_line(error: BaseException) -> str:
    """Of what an error says; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

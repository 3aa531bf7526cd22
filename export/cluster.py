"""Ray, started or joined in one way by every command that needs it: quiet, telling its makers nothing, on loopback."""

import os
import re
import secrets
import socket
from typing import Any

OLDEST = (2, 60)  # the oldest known to leave no port open that obeys whoever has no token


def connect(address: str, flag: str, extra: str) -> Any:
    """Ray, initialised; nothing is told to its makers, and what starts on this machine listens on this machine only.

    Args:
        address: of a cluster; "auto" is the one that runs here, "local" a new one for this process only.
        flag: what asked for Ray, for the message where it is absent.
        extra: of capavision, which brings it.

    Raises:
        ValueError: Ray is not installed, or too old to be started safely; no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    known = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if address == "local" or (known and known[1] in ("localhost", "127.0.0.1", "::1")):
        # Without this Ray takes the machine's outer address wherever 127.0.0.1 is meant.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # Some of Ray's ports are open to the network all the same: what starts here obeys only what starts here.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        import ray
        from ray import init  # any folder called ray can be imported
    except ImportError:
        raise ValueError(f"{flag} needs Ray: pip install 'capavision[{extra}]'") from None
    if address == "local" and tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        raise ValueError(f"Ray {ray.__version__} would open ports that obey anyone; pip install 'capavision[{extra}]'")
    small: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 2**27} if address == "local" else {}
    try:
        if known:  # Ray itself would try for ten minutes
            socket.create_connection((known[1], int(known[2])), timeout=5).close()
        init(address, log_to_driver=False, logging_level="ERROR", **small)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} ({error}); ray start --head begins one, and 'local' is one of this "
            "command alone"
        ) from error
    return ray

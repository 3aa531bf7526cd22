"""The Hugging Face hub, as far as an adapter needs it: fetch one file, upload one folder, errors in one line.

A name on the hub is "hf-hub:user/name" or "hf-hub:user/name@revision", revision a branch, a tag or a commit.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

SCHEME = "hf-hub:"
FILE = "adapter.safetensors"


def fetched(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """`path` itself, or, of a name on the hub, the local copy of its adapter, downloaded once.

    Raises:
        ValueError: a malformed name; no such repo, revision or adapter.
        OSError: the hub is out of reach and the file was not fetched before.

    >>> fetched("dtd.safetensors")
    'dtd.safetensors'
    """
    name = os.fspath(path)
    if not name.startswith(SCHEME):
        return path
    import huggingface_hub

    repo, at, revision = name.removeprefix(SCHEME).partition("@")
    check_repo(repo)
    if at and not revision:
        raise ValueError(f"{name} ends in @ without a revision; name a branch, tag or commit, or leave the @ out")
    with _explained(repo, revision), asked_once():
        return huggingface_hub.hf_hub_download(repo, FILE, revision=revision or None)


def upload(folder: Path, repo: str, *, private: bool, token: str | None, message: str) -> str:
    """Put the files of `folder` into the model repo, which is made where it is missing; returns its address.

    Raises:
        ValueError: a malformed repo id.
        OSError: the hub is out of reach, or refuses the account.
    """
    import huggingface_hub

    check_repo(repo)
    api = huggingface_hub.HfApi(token=token)
    with _explained(repo):
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return address


def check_repo(repo: str) -> None:
    """Raise ValueError unless `repo` reads user/name, in characters that the hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise ValueError(
            f"{repo!r} is no repo id ({_first_line(error)}); write user/name, in letters, digits, '-', '_' and '.'"
        ) from error


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Within it the hub's client is silent, and where one request finds the hub out of reach, the cache must do.

    Left to itself the client asks for each file six times, 23 seconds and 11 lines, even where the cache has it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as voice

    verbosity, offline = voice.get_verbosity(), constants.HF_HUB_OFFLINE
    voice.set_verbosity(logging.ERROR)
    try:
        constants.HF_HUB_OFFLINE = offline or not _answers()
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        voice.set_verbosity(verbosity)


def _answers() -> bool:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of httpx or requests, whichever this huggingface_hub stands on
        return False
    return True


@contextlib.contextmanager
def _explained(repo: str, revision: str = "") -> Iterator[None]:
    from huggingface_hub import errors

    # The transport's own errors too: httpx's or requests', whichever this huggingface_hub stands on.
    kinds = errors.HfHubHTTPError.__mro__
    transport = tuple(kind for kind in kinds if issubclass(kind, Exception) and kind is not Exception)
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no model repo {repo} that this account may use; check the name, or log in: `hf auth login`, "
            "or a token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r} on the hub; leave it out for the newest") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise OSError(
            f"the hub is out of reach and {repo} is not on this machine ({type(error).__name__}); connect, unset "
            "HF_HUB_OFFLINE, or pass a local file"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{repo} holds no {FILE}; only a repo that push_to_hub made can be loaded") from error
    except Exception as error:
        if not isinstance(error, (OSError, *transport)):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise OSError(
                f"the hub does not let this account into {repo} (HTTP {status}); log in with a token that may write "
                "there: `hf auth login`, or token="
            ) from error
        raise OSError(
            f"{repo}: the hub did not answer as expected ({type(error).__name__}: {_first_line(error)}); try again"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")

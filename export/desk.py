"""Requests to packages, whatever carries them: which are refused, with which HTTP status, and what the others get."""

import asyncio
import difflib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from export.runtime import Classifier, check_files, read_manifest

LARGEST = 2**24  # bytes of a request's body
HEARD = 4  # times that: a body up to there is heard out and dropped, since clients read no answer while they send
PATIENCE = 10.0  # seconds in which a body must arrive
DECODERS = 4  # images decoded at a time, of up to 0.5 GB each

Item = tuple[str, np.ndarray, int]  # task, pixels, top
Row = list[tuple[str, float]]


class RefusedError(Exception):
    """An answer that is no success: its HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def check(packages: Sequence[Path]) -> list[str]:
    """The tasks of all packages, whose files are whole.

    Raises:
        ValueError: no package, a changed file, a task that two packages have.
    """
    owners: dict[str, Path] = {}
    for package in packages:
        manifest = read_manifest(package)
        check_files(package, manifest)
        for task in manifest["tasks"]:
            if task in owners:
                raise ValueError(f"{owners[task]} and {package} both have a task {task!r}; serve them on two ports")
            owners[task] = package
    return list(owners)


async def read_body(headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> bytes:
    """The whole body, if it is small and comes in time.

    Raises:
        RefusedError: it is, or says it is, larger than `LARGEST` (413), or takes longer than `PATIENCE` (408).
    """
    too_large = RefusedError(413, f"the body is larger than {LARGEST:,} bytes; send a smaller image")
    declared, body, size = headers.get("content-length", "0"), bytearray(), 0
    if not declared.isdecimal() or int(declared[:20]) > HEARD * LARGEST:
        raise too_large
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in chunks:
                size += len(chunk)
                if size > HEARD * LARGEST:
                    raise too_large
                if size <= LARGEST:
                    body += chunk
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive in {PATIENCE:g} seconds") from None
    if size > LARGEST:
        raise too_large
    return bytes(body)


class Desk:
    """The packages of one replica, and what it answers.

    Args:
        packages: their folders; no two have a task in common.
        threads: of ONNX Runtime, for each package.
    """

    def __init__(self, packages: Sequence[Path], threads: int) -> None:
        loaded = [Classifier(package, threads=threads) for package in packages]
        self.models = {task: classifier for classifier in loaded for task in classifier.tasks}
        self.decoders = ThreadPoolExecutor(DECODERS)

    def tasks(self) -> dict[str, list[str]]:
        """Each task's labels."""
        return {task: model.manifest["tasks"][task]["labels"] for task, model in self.models.items()}

    async def predict(
        self, query: Mapping[str, str], body: bytes, batched: Callable[[Item], Awaitable[Row]]
    ) -> dict[str, Any]:
        """The most probable labels of the image in `body`; `batched` sends it through `rows`, with others.

        Raises:
            RefusedError: an unknown task (404); no image, or a `top` that is no number (400).
        """
        task, top = self._task(query.get("task")), query.get("top", "5")
        if not (top.isascii() and top.isdecimal() and int(top[:20]) > 0):
            raise RefusedError(400, f"top={top[:20]!r} must be a whole number from 1")
        decoding = asyncio.get_running_loop().run_in_executor(self.decoders, self.models[task].preprocess, body)
        try:
            pixels = await decoding
        except ValueError as error:
            raise RefusedError(400, f"{error}; the body must be an image file and nothing else") from None
        row = await batched((task, pixels, int(top[:20])))
        return {"task": task, "predictions": [{"label": label, "probability": p} for label, p in row]}

    def _task(self, given: str | None) -> str:
        if given is None and len(self.models) > 1:
            raise RefusedError(
                400, f"name a task, as in /predict?task={next(iter(self.models))}; GET /tasks lists them"
            )
        task = next(iter(self.models)) if given is None else given
        if task not in self.models:
            near = difflib.get_close_matches(task, self.models, n=4) or list(self.models)[:4]
            raise RefusedError(404, f"there is no task {task[:80]!r}; did you mean {' or '.join(map(repr, near))}?")
        return task

    def rows(self, items: Sequence[Item]) -> list[Row]:
        """The labels of a batch, in its order: one run of the session for each task in it."""
        found: dict[int, Row] = {}
        for task in {task for task, _, _ in items}:
            own = [i for i, item in enumerate(items) if item[0] == task]
            most = max(items[i][2] for i in own)
            rows = self.models[task].predict([items[i][1] for i in own], top=most, task=task)  # squashed: kept as it is
            found |= {i: row[: items[i][2]] for i, row in zip(own, rows, strict=True)}
        return [found[i] for i in range(len(items))]

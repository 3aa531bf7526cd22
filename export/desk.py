"""Requests to a package, whatever carries them: which are refused, with which HTTP status, and what the others get."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from export.runtime import Classifier

LARGEST = 2**24  # bytes of a request's body
HEARD = 4  # times that: a body up to there is heard out and dropped, since clients read no answer while they send
PATIENCE = 10.0  # seconds in which a body must arrive
DECODERS = 4  # images decoded at a time, of up to 1.1 GB each
MOST = 9999  # labels of an answer
PARAMETERS = ("task", "top")  # of a query

Item = tuple[str, np.ndarray]  # task, pixels
Row = list[tuple[str, float]]


class RefusedError(Exception):
    """An answer that is no success: its HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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
    """The package of one replica, and what it answers.

    Args:
        package: its folder.
        threads: of ONNX Runtime.
        queue: the most requests that it works on or that wait.
        variant: which graph answers; no dynamic int8, whose answers depend on the others of a batch.
    """

    def __init__(self, package: Path, threads: int, queue: int = 256, variant: str = "float32") -> None:
        self.waiting, self.queue = 0, queue
        self.model = Classifier(package, threads=threads, variant=variant)
        self.model.pixels()  # a package of texts is refused now, not at the first request
        self.decoders = ThreadPoolExecutor(DECODERS)  # a semaphore would forget those whose client has gone

    def tasks(self) -> dict[str, list[str]]:
        """Each task's labels."""
        return {name: task["labels"] for name, task in self.model.manifest["tasks"].items()}

    async def predict(
        self, query: Mapping[str, str], body: bytes, batched: Callable[[Item], Awaitable[Row]]
    ) -> dict[str, Any]:
        """The most probable labels of the image in `body`; `batched` sends it through `rows`, with others.

        Raises:
            RefusedError: too many wait (503); no such task (404); another parameter, none named of several tasks, a
                `top` that is no number, no image (400).
        """
        if unknown := sorted(query.keys() - PARAMETERS):
            raise RefusedError(400, f"there is no parameter {unknown[0][:80]!r}; there are {' and '.join(PARAMETERS)}")
        tasks, top = self.model.tasks, query.get("top", "5")
        task = query.get("task", tasks[0] if len(tasks) == 1 else None)
        if task is None:
            raise RefusedError(400, f"name a task, as in /predict?task={tasks[0]}; GET /tasks lists them")
        if task not in tasks:
            raise RefusedError(404, f"there is no task {task[:80]!r}; GET /tasks lists them")
        if not re.fullmatch(r"[1-9][0-9]{0,3}", top):
            raise RefusedError(400, f"top={top[:20]!r} must be a whole number from 1 to {MOST}")
        if not body:
            raise RefusedError(400, "the body is empty; it must be an image file, as curl --data-binary @cat.jpg sends")
        if self.waiting == self.queue:
            raise RefusedError(503, f"{self.queue} requests wait already; try again in a moment")
        self.waiting += 1
        try:
            try:
                pixels = await asyncio.get_running_loop().run_in_executor(self.decoders, self.model.preprocess, body)
            except ValueError as error:
                raise RefusedError(400, f"{error}; the body must be an image file and nothing else") from None
            row = await batched((task, pixels))
        finally:
            self.waiting -= 1
        return {"task": task, "predictions": [{"label": label, "probability": p} for label, p in row[: int(top)]]}

    def rows(self, items: Sequence[Item]) -> list[Row]:
        """The labels of a batch, in its order: one run of the session for each task in it."""
        found: dict[int, Row] = {}
        for task in {task for task, _ in items}:
            own = [i for i, (named, _) in enumerate(items) if named == task]
            pixels = [items[i][1] for i in own]  # squashed: kept as it is
            found |= zip(own, self.model.predict(pixels, MOST, task), strict=True)
        return [found[i] for i in range(len(items))]

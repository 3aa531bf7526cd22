"""Packages behind HTTP, on Ray Serve: python -m export.serve DIR --port 8000

GET  /tasks                      names and labels
POST /predict?task=NAME&top=5    the body is an image file; where there is one task it need not be named
GET  /healthz                    200 when a replica answers; Ray's own /-/healthz never waits in the queue
GET  /metrics                    Prometheus text: what Ray and Ray Serve count on the replica's machine

curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top=3'

A task is a parameter of the request and no multiplexed model: the tasks of a package share one session, a switch costs
nothing, and multiplexing would route by task, and load and evict, what every replica has in memory anyway.
"""

import asyncio
import difflib
import os
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from export import cli
from export.cluster import connect
from export.images import decode
from export.runtime import Classifier, check_files, read_manifest

LARGEST = 2**24  # bytes of a request's body
PATIENCE = 10  # seconds in which a body must arrive
DECODERS = 4  # images decoded at a time: each may take 0.5 GB
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Item = tuple[str, np.ndarray, int]  # task, pixels, top
Row = list[tuple[str, float]]


class RefusedError(Exception):
    """An answer that is no success: its HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Desk:
    """Requests to the packages of one replica, whatever carries them."""

    def __init__(self, packages: Sequence[Path], threads: int) -> None:
        loaded = [Classifier(package, threads=threads) for package in packages]
        self.models = {task: classifier for classifier in loaded for task in classifier.tasks}
        self.decoders = ThreadPoolExecutor(DECODERS)

    def tasks(self) -> dict[str, Any]:
        """What GET /tasks says."""
        return {task: {"labels": model.manifest["tasks"][task]["labels"]} for task, model in self.models.items()}

    async def predict(
        self, query: Mapping[str, str], body: bytes, batched: Callable[[Item], Awaitable[Row]]
    ) -> dict[str, Any]:
        """What POST /predict says.

        Raises:
            RefusedError: an unknown task (404), a body that is no image, a `top` that is no number (400).
        """
        task, top = self._task(query.get("task")), query.get("top", "5")
        if not top.isdecimal() or not 0 < int(top) < 10**9:
            raise RefusedError(400, f"top={top[:20]!r} must be a whole number from 1")
        try:
            pixels = await asyncio.get_running_loop().run_in_executor(self.decoders, self._pixels, task, body)
        except ValueError as error:
            raise RefusedError(400, f"{error}; send an image file itself as the body") from None
        row = await batched((task, pixels, int(top)))
        return {"task": task, "predictions": [{"label": label, "probability": p} for label, p in row]}

    def _task(self, given: str | None) -> str:
        if given is None and len(self.models) > 1:
            raise RefusedError(400, f"name a task: /predict?task=… of {', '.join(self.models)}")
        task = next(iter(self.models)) if given is None else given
        if task not in self.models:
            near = difflib.get_close_matches(task, self.models) or list(self.models)[:8]
            raise RefusedError(404, f"there is no task {task[:80]!r}; did you mean {' or '.join(map(repr, near))}?")
        return task

    def _pixels(self, task: str, body: bytes) -> np.ndarray:
        return self.models[task].preprocess(decode(body))

    def rows(self, items: Sequence[Item]) -> list[Row]:
        """The labels of a batch: one run of the session for each task in it."""
        found: dict[int, Row] = {}
        for task in {task for task, _, _ in items}:
            own = [i for i, item in enumerate(items) if item[0] == task]
            most = max(items[i][2] for i in own)
            rows = self.models[task].predict([items[i][1] for i in own], top=most, task=task)
            found |= {i: row[: items[i][2]] for i, row in zip(own, rows, strict=True)}
        return [found[i] for i in range(len(items))]


async def read_body(headers: Mapping[str, str], chunks: AsyncIterator[bytes]) -> bytes:
    """The whole body, if it is small and comes in time.

    Raises:
        RefusedError: it is, or says it is, larger than `LARGEST` (413), or takes longer than `PATIENCE` (408).
    """
    too_large = RefusedError(413, f"the body is larger than {LARGEST:,} bytes; send a smaller image")
    declared, body = headers.get("content-length", "0"), bytearray()
    if declared.isdecimal() and int(declared) > LARGEST:
        raise too_large
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in chunks:
                body += chunk
                if len(body) > LARGEST:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"the body did not arrive in {PATIENCE} seconds") from None
    return bytes(body)


class Doorman:
    """ASGI middleware of Ray's proxy: a request enters the queue when its body is here, so no slow client fills it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        try:
            body = await read_body(request.headers, request.stream())
        except RefusedError as error:
            return await JSONResponse({"error": str(error)}, error.status)(scope, receive, send)
        except ClientDisconnect:
            return None
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        return await self.app(scope, again, send)


def doormen() -> list[Any]:
    """What Ray's proxies import by name when they start."""
    from starlette.middleware import Middleware

    return [Middleware(Doorman)]


def application(packages: Sequence[Path], threads: int, replicas: int, batch: int, queue: int) -> Any:
    """The Ray Serve application."""
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=4 * batch,
        max_queued_requests=queue,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": threads},
    )
    class Capavision:
        def __init__(self) -> None:
            self.desk = Desk(packages, threads)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=0.005)
        async def batched(self, items: list[Item]) -> list[Row]:
            return await asyncio.to_thread(self.desk.rows, items)

        async def __call__(self, request: Request) -> Response:
            try:
                return await self.answer(request)
            except RefusedError as error:
                return JSONResponse({"error": str(error)}, error.status)

        async def answer(self, request: Request) -> Response:
            match request.method, request.url.path:
                case "POST", "/predict":
                    body = await read_body(request.headers, request.stream())
                    return JSONResponse(await self.desk.predict(request.query_params, body, self.batched))
                case "GET", "/tasks":
                    return JSONResponse(self.desk.tasks())
                case "GET", "/healthz":
                    return PlainTextResponse("ok")
                case "GET", "/metrics":
                    return PlainTextResponse(await asyncio.to_thread(metrics))
            raise RefusedError(404, "there are POST /predict, GET /tasks, GET /healthz and GET /metrics")

    return Capavision.bind()


def metrics() -> str:
    """What Ray's agent on this machine tells Prometheus."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            text: str = answer.read().decode()
            return text
    except OSError as error:
        raise RefusedError(503, f"Ray's metrics agent does not answer ({error})") from None


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


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; requests that have begun are answered first."""
    parser = cli.Parser(prog="python -m export.serve", description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, nargs="+", metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only; there is no login")
    parser.add_argument("--address", default="local", help="of a Ray cluster that sees DIR (default: none, local)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of the model (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each (default: this machine's cores, shared out)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="most images a run (default: 16)")
    parser.add_argument("--queue", type=int, default=512, metavar="N", help="most that wait; then 503 (default: 512)")
    args = parser.parse_args(argv)
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // max(1, args.replicas))
    for flag in ("port", "replicas", "threads", "batch", "queue"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be at least 1")
    packages = [package.absolute() for package in args.packages]
    tasks = check(packages)
    _check_free(args.host, args.port)
    if args.host not in LOOPBACK:
        print(f"warning: {args.host} is no loopback address: whoever reaches it may use this server", file=sys.stderr)
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "export.serve.doormen")
    ray = connect(args.address, "export.serve", "serve")
    try:
        _serve(ray, args, packages, tasks)
    finally:
        ray.shutdown()


def _check_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port} cannot be listened on ({error}); name another") from None


def _serve(ray: Any, args: Any, packages: Sequence[Path], tasks: Sequence[str]) -> None:
    from ray import serve

    cores = ray.cluster_resources().get("CPU", 0)
    if args.replicas * args.threads > cores:
        raise ValueError(f"{args.replicas} replicas of {args.threads} threads do not fit on {cores:g} cores")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    serve.start(http_options={"host": args.host, "port": args.port, "request_timeout_s": 60}, logging_config=quiet)
    try:
        serve.run(
            application(packages, args.threads, args.replicas, args.batch, args.queue),
            name="capavision",
            logging_config=quiet,
        )
    except RuntimeError as error:
        raise ValueError(f"the replicas do not start: {error}") from error
    print(f"{', '.join(tasks)}: http://{args.host}:{args.port}/predict; Ctrl-C ends it", flush=True)
    stop.wait()
    print("answering what has begun, then stopping", flush=True)
    serve.delete("capavision")
    if args.address == "local":
        serve.shutdown()


if __name__ == "__main__":
    cli.run(main, stopped="the server is down")

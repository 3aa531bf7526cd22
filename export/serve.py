"""Packages behind HTTP, on Ray Serve: python -m export.serve DIR --port 8000

POST /predict?task=NAME&top=5    the body is an image file; where there is one task it need not be named
GET  /tasks                      names and labels
GET  /healthz                    200 when a replica answers; Ray's own /-/healthz never waits in the queue
GET  /metrics                    Prometheus text: what Ray and Ray Serve count on the replica's machine

curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top=3'

A task is a parameter of the request and no multiplexed model: the tasks of a package share one session, a switch costs
nothing, and multiplexing would route by task, and load and evict, what every replica has in memory anyway.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export import cli
from export.cluster import connect
from export.desk import Desk, Item, RefusedError, Row, check, read_body

LOOPBACK = ("127.0.0.1", "::1", "localhost")
NAME = "capavision"


class Doorman:
    """ASGI middleware of Ray's proxy: a request queues once its body is here, so slow clients cannot fill the queue."""

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


def application(packages: Sequence[Path], replicas: int, threads: int, batch: int, queue: int) -> Any:
    """The Ray Serve application: each replica a `Desk`, whose images meet in batches."""
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=queue,  # they wait in the replica: Ray's router asks a full one again only now and then
        max_queued_requests=queue,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": threads},
    )
    class Replica:
        def __init__(self) -> None:
            self.desk = Desk(packages, threads)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=0.005)
        async def batched(self, items: list[Item]) -> list[Row]:
            return await asyncio.to_thread(self.desk.rows, items)

        async def __call__(self, request: Request) -> Response:
            try:
                match request.method, request.url.path:
                    case "POST", "/predict":
                        body = await read_body(request.headers, request.stream())  # a cluster may have no Doorman
                        return JSONResponse(await self.desk.predict(request.query_params, body, self.batched))
                    case "GET", "/tasks":
                        return JSONResponse(self.desk.tasks())
                    case "GET", "/healthz":
                        return PlainTextResponse("ok")
                    case "GET", "/metrics":
                        return PlainTextResponse(await asyncio.to_thread(metrics))
                raise RefusedError(404, "there are POST /predict, GET /tasks, GET /healthz and GET /metrics")
            except RefusedError as error:
                return JSONResponse({"error": str(error)}, error.status)

    return Replica.bind()


def metrics() -> bytes:
    """What Ray's agent on this machine tells Prometheus.

    Raises:
        RefusedError: it does not answer (503).
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            content: bytes = answer.read()
            return content
    except OSError as error:
        raise RefusedError(503, f"Ray's metrics agent does not answer ({error})") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's flags.

    Raises:
        ValueError: a number below 1; an address that cannot be listened on.
    """
    parser = cli.Parser(prog="python -m export.serve", description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, nargs="+", metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only; there is no login")
    parser.add_argument("--address", default="local", help="of a Ray cluster whose machines see DIR (default: local)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of the model (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each (default: this machine's cores, shared out)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="most images a run (default: 16)")
    parser.add_argument(
        "--queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that a replica holds, and as many before it; then 503 (default: 256)",
    )
    args = parser.parse_args(argv)
    if args.threads is None:
        args.threads = max(1, (os.cpu_count() or 1) // max(1, args.replicas))
    for flag in ("port", "replicas", "threads", "batch", "queue"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)} must be at least 1")
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {args.host} --port {args.port} cannot be listened on ({error})") from None
    return args


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; what has begun is answered first."""
    args = parse(argv)
    args.packages = [package.absolute() for package in args.packages]
    tasks = check(args.packages)
    if args.host not in LOOPBACK:
        print(f"warning: {args.host} is no loopback address; whoever reaches it may use this server", file=sys.stderr)
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "export.serve.doormen")
    ray = connect(args.address, "export.serve", "serve")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        _serve(ray, args)
        print(f"{', '.join(tasks)} at http://{args.host}:{args.port}/predict; Ctrl-C ends it", flush=True)
        stop.wait()
        print("answering what has begun, then stopping", flush=True)
    finally:
        _stop(ray)


def _serve(ray: Any, args: argparse.Namespace) -> None:
    cores = ray.cluster_resources().get("CPU", 0)
    if args.replicas * args.threads > cores:
        raise ValueError(f"{args.replicas} replicas of {args.threads} threads do not fit on {cores:g} cores")
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    app = application(args.packages, args.replicas, args.threads, args.batch, args.queue)
    try:
        serve.start(http_options={"host": args.host, "port": args.port, "request_timeout_s": 60}, logging_config=quiet)
        serve.run(app, name=NAME, logging_config=quiet)
    except RuntimeError as error:
        raise ValueError(f"Ray Serve does not start the replicas: {error}") from error


def _stop(ray: Any) -> None:
    from ray import serve

    if NAME in serve.status().applications:
        serve.delete(NAME)  # waits for the requests that have begun
    ray.shutdown()  # a Ray of our own ends with this; a cluster goes on


if __name__ == "__main__":
    cli.run(main, stopped="the server is down")

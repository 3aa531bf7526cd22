"""A package behind HTTP, on Ray Serve: python -m export.serve DIR --port 8000

POST /predict?task=NAME&top=5    the body is an image file; where there is one task it need not be named
GET  /tasks                      names and labels
GET  /-/healthz                  200 while the server serves; Ray answers it, so that it never waits in the queue
GET  /metrics                    Prometheus text: what Ray and Ray Serve count on the replica's machine

curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top=3'

Images meet in batches, so any --variant answers but dynamic int8: that takes its scales from a whole batch, and an
answer would depend on its neighbours. A task is a parameter of the request and no multiplexed model: the tasks of a
package share one session, a switch costs nothing, and multiplexing would route by task, and load and evict, what every
replica has in memory anyway.
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
from pathlib import Path
from typing import Any

from export import cli
from export.cluster import connect
from export.desk import Desk, Item, RefusedError, Row, read_body
from export.runtime import check_files, graph_of, kind_of, read_manifest

LOOPBACK = ("127.0.0.1", "::1", "localhost")
NAME = "capavision"
CLIENTS = 4096  # of a replica, most of them perhaps slow: only a request whose body is here counts as waiting


def application(args: argparse.Namespace) -> Any:
    """The Ray Serve application: each replica a `Desk`, whose images meet in batches."""
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response

    @serve.deployment(
        num_replicas=args.replicas,
        max_ongoing_requests=CLIENTS,
        max_queued_requests=CLIENTS,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": args.threads},
    )
    class Replica:
        def __init__(self) -> None:
            self.desk = Desk(args.package, args.threads, args.queue, args.variant)

        @serve.batch(max_batch_size=args.batch, batch_wait_timeout_s=0.005)
        async def batched(self, items: list[Item]) -> list[Row]:
            return await asyncio.to_thread(self.desk.rows, items)

        async def __call__(self, request: Request) -> Response:
            try:
                match request.method, request.url.path:
                    case "POST", "/predict":
                        body = await read_body(request.headers, request.stream())
                        return JSONResponse(await self.desk.predict(request.query_params, body, self.batched))
                    case "GET", "/tasks":
                        return JSONResponse(self.desk.tasks())
                    case "GET", "/metrics":
                        return PlainTextResponse(await asyncio.to_thread(metrics))
                raise RefusedError(404, "there are POST /predict, GET /tasks, GET /metrics and GET /-/healthz")
            except RefusedError as error:
                return JSONResponse({"error": str(error)}, error.status)

    return Replica.bind()


def metrics() -> bytes:
    """What Ray's agent on this machine tells Prometheus, on a port that Ray chose.

    Raises:
        RefusedError: it does not answer (503).
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bytes(answer.read())
    except OSError as error:
        raise RefusedError(503, f"Ray's metrics agent does not answer ({error})") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's flags.

    Raises:
        ValueError: a number below 1; an address that cannot be listened on; no package of images, or a changed one;
            dynamic int8, or a variant that there is not.
    """
    parser = cli.Parser(prog="python -m export.serve", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only; there is no login")
    parser.add_argument("--address", default="local", help="of a Ray cluster whose machines see DIR (default: local)")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="copies of the model (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each (default: this machine's cores, shared out)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="most images a run (default: 16)")
    queue = "requests that wait in a replica; then 503 (default: 256)"
    parser.add_argument("--queue", type=int, default=256, metavar="N", help=queue)
    parser.add_argument("--variant", default="float32", metavar="NAME", help="which graph answers (default: float32)")
    args = parser.parse_args(argv)
    cli.at_least(1, args, "port", "replicas", "threads", "batch", "queue")
    args.package, args.threads = args.package.absolute(), args.threads or max(1, (os.cpu_count() or 1) // args.replicas)
    manifest = read_manifest(args.package)
    if (kind := kind_of(manifest)) != "image":
        raise ValueError(
            f"{args.package} takes {kind}s, and the server takes images; python -m export.predict takes all"
        )
    check_files(args.package, manifest)
    if args.variant == "int8":
        raise ValueError(
            "--variant int8 takes its scales from a whole batch, so an answer would depend on its neighbours; serve "
            "int8-static, float16 or float32"
        )
    graph_of(args.package, manifest, args.variant)
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {args.host} --port {args.port} cannot be listened on ({error})") from None
    if args.host not in LOOPBACK:
        print(f"warning: {args.host} is no loopback address; whoever reaches it may use this server", file=sys.stderr)
    return args


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM; what has begun is answered first."""
    args = parse(argv)
    ray = connect(args.address, "export.serve", "serve")
    try:
        from ray import serve
    except ImportError:
        raise ValueError("export.serve needs Ray Serve: pip install 'capavision[serve]'") from None
    if serve.status().applications:
        raise ValueError("Ray Serve on that cluster serves something already, which this would replace; end it first")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        _start(ray, args)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"{args.package.name} at http://{host}:{args.port}/predict; Ctrl-C ends it", flush=True)
        stop.wait()
        print("answering what has begun, then stopping", flush=True)
    finally:
        if NAME in serve.status().applications:
            serve.delete(NAME)  # waits for the requests that have begun
        if args.address != "local":
            serve.shutdown()  # the cluster's proxy would keep the port
        ray.shutdown()  # a Ray of our own ends with this; a cluster goes on


def _start(ray: Any, args: argparse.Namespace) -> None:
    cores = ray.cluster_resources().get("CPU", 0)
    if args.replicas * args.threads > cores:
        raise ValueError(f"{args.replicas} replicas of {args.threads} threads do not fit on {cores:g} cores")
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = {"log_level": "ERROR", "enable_access_log": False}
    try:
        serve.start(http_options={"host": args.host, "port": args.port, "request_timeout_s": 60}, logging_config=quiet)
        serve.run(application(args), name=NAME, logging_config=quiet)
    except RuntimeError as error:
        raise ValueError(f"Ray Serve does not start the replicas: {error}") from error


if __name__ == "__main__":
    cli.run(main, stopped="the server is down")

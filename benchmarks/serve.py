"""A package's server under load and under garbage: python -m benchmarks.serve DIR

The server is started on 127.0.0.1, with the flags after --, and stopped at the end. First many clients ask at once,
each again as soon as it is answered; then come random bytes, bodies that are too large or only say so, and clients that
send a byte at a time, all while an honest client goes on asking.
"""

import asyncio
import io
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export import cli
from export.runtime import Classifier

START = 180  # seconds that a server may take to start
LIMIT = 90.0  # seconds that one request may take


async def ask(port: int, request: bytes) -> int:
    """The status of the answer to one raw request on a connection of its own; 0 where there is none."""
    try:
        async with asyncio.timeout(LIMIT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                line = await reader.readline()
                await reader.read()
                return int(line.split()[1])
            finally:
                writer.close()
    except (OSError, TimeoutError, IndexError, ValueError):
        return 0


def post(body: bytes, length: int | None = None, path: str = "/predict") -> bytes:
    """A raw request; `length` may lie about its body."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body


async def load(port: int, request: bytes, clients: int, requests: int, seconds: float) -> dict[str, Any]:
    """`clients` at a time until `requests` are answered or `seconds` are over."""
    left, times, statuses = iter(range(requests)), [], Counter[int]()
    start = time.perf_counter()

    async def client() -> None:
        for _ in left:
            if time.perf_counter() - start > seconds:
                return
            began = time.perf_counter()
            statuses[await ask(port, request)] += 1
            times.append(time.perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - start
    p50, p99 = np.percentile(times, [50, 99])
    rate, errors = len(times) / took, len(times) - statuses[200]
    return {"requests": len(times), "rate": rate, "p50": p50, "p99": p99, "errors": errors, "statuses": dict(statuses)}


def garbage(rng: random.Random, image: bytes) -> list[bytes]:
    """Requests that deserve no success."""
    return [
        rng.randbytes(2000),
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        post(rng.randbytes(2000)),
        post(image[: len(image) // 2]),
        post(b"", 10**15),
        post(bytes(2**24 + 1)),
        post(image, path="/predict?task=" + "x" * 1000),
        post(image, path="/predict?top=-1"),
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n",
    ]


async def linger(port: int, request: bytes, seconds: float) -> None:
    """A client that sends the head of a request and then a byte at a time."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        end = time.perf_counter() + seconds
        for i in range(len(request)):
            if time.perf_counter() > end:
                break
            writer.write(request[:200] if i == 0 else request[199 + i : 200 + i])
            await writer.drain()
            await asyncio.sleep(0.5)
        writer.close()
    except OSError:
        pass


async def abuse(port: int, request: bytes, image: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """Garbage and `clients` that linger, for `seconds`; what an honest client meets meanwhile."""
    rng, bad, slow = random.Random(0), Counter[int](), [linger(port, request, seconds) for _ in range(clients)]
    end = time.perf_counter() + seconds

    async def vandal() -> None:
        while time.perf_counter() < end:
            for status in await asyncio.gather(*(ask(port, each) for each in garbage(rng, image))):
                bad[status] += 1

    crowd = asyncio.gather(*slow, vandal())
    await asyncio.sleep(1)
    honest = await load(port, request, 1, 10**6, seconds - 1)
    await crowd
    return {**honest, "garbage": dict(sorted(bad.items()))}


def direct(package: Path, image: bytes, seconds: float) -> dict[str, Any]:
    """The same images through the package in this process, 16 at a time: what a server can reach at most."""
    classifier, times = Classifier(package), []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or not times:
        began = time.perf_counter()
        classifier.predict([image] * 16)
        times.append(time.perf_counter() - began)
    p50, p99 = np.percentile(times, [50, 99])
    return {"requests": 16 * len(times), "rate": 16 * len(times) / sum(times), "p50": p50, "p99": p99, "errors": 0}


def started(package: Path, port: int, flags: list[str]) -> subprocess.Popen[bytes]:
    """The server, once it answers.

    Raises:
        ValueError: it ends, or does not answer in time.
    """
    command = [sys.executable, "-m", "export.serve", str(package), "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + START
    while time.monotonic() < end and server.poll() is None:
        if asyncio.run(ask(port, b"GET /-/healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")) == 200:
            return server
        time.sleep(0.5)
    server.terminate()
    raise ValueError(f"{' '.join(command)} does not answer")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Start, load, abuse, stop; print the figures and return them."""
    parser = cli.Parser(prog="python -m benchmarks.serve", description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, metavar="DIR", help="what python -m export wrote, of one task")
    parser.add_argument("--port", type=int, default=8765, metavar="N", help="default: 8765")
    parser.add_argument("--clients", type=int, default=200, metavar="N", help="at a time (default: 200)")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="at most (default: 2000)")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of load at most (default: 60)")
    parser.add_argument("--abuse", type=float, default=15, metavar="S", help="seconds of garbage (default: 15)")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    image = buffer.getvalue()
    bare = direct(args.package, image, 5)
    server = started(args.package, args.port, argv[cut + 1 :])
    try:
        asyncio.run(load(args.port, post(image), 8, 64, args.seconds))  # warm
        loaded = asyncio.run(load(args.port, post(image), args.clients, args.requests, args.seconds))
        abused = asyncio.run(abuse(args.port, post(image), image, args.clients, args.abuse))
        after = asyncio.run(load(args.port, post(image), args.clients, args.clients, args.seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    for name, row in (("no server", bare), ("load", loaded), ("under garbage", abused), ("afterwards", after)):
        print(
            f"{name:<14} {row['requests']} requests, {row['rate']:.1f}/s, p50 {1000 * row['p50']:.0f} ms, "
            f"p99 {1000 * row['p99']:.0f} ms, errors {row['errors']} {row.get('statuses', '')}"
        )
    print(
        f"garbage was answered with {abused['garbage']} (0: closed without an answer); the server ended with {status}"
    )
    return {
        "direct": bare,
        "load": loaded,
        "abuse": abused,
        "after": after,
        "status": status,
        "image_bytes": len(image),
    }


if __name__ == "__main__":
    cli.run(main)

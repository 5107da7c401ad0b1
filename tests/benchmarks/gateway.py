"""What the gateway adds to a call, beside other gateways, and how many streams it carries at once.

    python tests/benchmarks/gateway.py --router ROUTER --prompts prompts.parquet
    python tests/benchmarks/peer_gateways.py  # prints --upstream, --litellm and --switchyard for the former

Each prompt is asked in turn of `/v1/route`, the upstream itself and the gateway, and of both as streams, up to their
first event; a mark before it keeps its prefix from being known. Then `--streams` begin at once, directly and through
the gateway. The upstream is that of the tests, in a process of its own. One JSON line last goes to stdout.

`compared` has what each way to the upstream adds to the direct call of the same prompt, whole and until the first byte
of a stream; the ways take turns in random order. `rates` has calls/s at `--concurrency`, and the CPU time of the
gateway's processes for each, Ray's own among them. Other gateways do not read prompts, nor do calls of a named target
(`pinned`); `routed` ones do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from prefill_router.common.console import say
from prefill_router.router.artifact import Router
from serving import serving
from upstream import Upstream

Ways = dict[str, tuple[str, str]]  # by name: the URL and the model to ask for

MS = 1e3
WARM_UP = 5
NUM_WORDS = 60
CHAT = "/v1/chat/completions"
PEERS = ("litellm", "switchyard")


def serve_upstream(told: Connection, between_chunks_s: float) -> None:
    with Upstream("upstream", models=("model",)) as upstream:
        upstream.between_chunks_s = between_chunks_s
        told.send(upstream.url)
        told.recv()


@contextlib.contextmanager
def upstream(between_chunks_s: float) -> Iterator[str]:
    """The base URL of one in another process."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_upstream, args=(there, between_chunks_s))
    process.start()
    try:
        yield here.recv()
    finally:
        here.send(None)
        process.join()


def port_of(url: str) -> int:
    return int(url.split("//")[1].split("/")[0].split(":")[1])


def write_pool(router: Router, url: str, folder: Path) -> str:
    lines = []
    for target in router.pool.targets:
        lines += ["[[pool]]", f"name = {json.dumps(target.name)}", f"input_price = {target.input_price}"]
        lines += [f"output_price = {target.output_price}", f'upstream = {{ base_url = "{url}", model = "model" }}']
    path = folder / "pool.toml"
    path.write_text("\n".join(lines))
    return str(path)


def flags(router: Router, url: str, folder: str) -> dict[str, Any]:
    """Of `serve`: the pool, and patience, since the machine may be busy."""
    return {"pool": write_pool(router, url, Path(folder)), "max_wait_s": 60, "route_timeout_s": 60}


def ways_to(url: str, gateway: str, router: Router) -> Ways:
    """The ways to the upstream at `url`, directly and through the gateway."""
    return {"direct": (url, "model"), "pinned": (gateway, router.pool.target_names[0]), "routed": (gateway, "auto")}


def asked_ms(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> float:
    """Until the whole answer has come, or the first event of a stream."""
    time.sleep(0.02)  # the threads of the last call spin for a while
    connection.close()
    connection.connect()  # servers close idle connections
    started = time.perf_counter()
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    content = response.read1(1) if body.get("stream") else response.read()
    taken_ms = (time.perf_counter() - started) * MS
    assert response.status == 200, content
    response.read()
    return taken_ms


def added(gateway: str, url: str, prompts: Sequence[str]) -> dict[str, float]:
    """Medians over prompts, and of what each call through the gateway took beside its parts."""
    ours, theirs = (http.client.HTTPConnection("127.0.0.1", port_of(u)) for u in (gateway, url))
    rows = []
    for prompt in prompts:

        def messages(prompt: str = prompt) -> list[dict[str, str]]:
            return [{"role": "user", "content": f"[{random.getrandbits(40):x}] {prompt}"}]

        rows.append(
            [
                asked_ms(ours, "/v1/route", {"messages": messages()}),
                asked_ms(theirs, CHAT, {"model": "model", "messages": messages()}),
                asked_ms(ours, CHAT, {"messages": messages()}),
                asked_ms(theirs, CHAT, {"model": "model", "messages": messages(), "stream": True}),
                asked_ms(ours, CHAT, {"messages": messages(), "stream": True}),
            ]
        )
    route, direct, whole, direct_first, first = np.array(rows[WARM_UP:]).T
    return {
        "route_ms": float(np.median(route)),
        "whole_over_route_ms": float(np.median(whole - direct - route)),
        "first_event_over_route_ms": float(np.median(first - direct_first - route)),
    }


def compared(ways: Ways, prompts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Milliseconds by way: medians and 99th percentiles, of `direct` the time itself, of others what they add to it."""
    connections = {way: http.client.HTTPConnection("127.0.0.1", port_of(url)) for way, (url, _) in ways.items()}
    kinds = {"whole": False, "first_byte": True}
    rows: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for prompt in prompts:
        for kind, is_stream in kinds.items():
            taken_ms = {}
            for way in random.sample(sorted(ways), len(ways)):
                messages = [{"role": "user", "content": f"[{random.getrandbits(40):x}] {prompt}"}]
                body = {"model": ways[way][1], "messages": messages, "stream": is_stream}
                taken_ms[way] = asked_ms(connections[way], CHAT, body)
            rows[kind].append([taken_ms[way] - taken_ms["direct"] * (way != "direct") for way in ways])
    report: dict[str, dict[str, float]] = {way: {} for way in ways}
    for kind, of_kind in rows.items():
        p50, p99 = np.percentile(np.array(of_kind[WARM_UP:]), [50, 99], axis=0)
        for i, way in enumerate(ways):
            report[way] |= {f"{kind}_p50_ms": float(p50[i]), f"{kind}_p99_ms": float(p99[i])}
    return report


def listener(url: str) -> int:
    """The process that listens at a URL of this machine."""
    at = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port_of(url)]
    assert at, f"nothing listens at {url}"
    return int(at[0].pid)


def cpu_s(root: int) -> float:
    """CPU seconds so far of a process and those it started, which stay until it ends."""
    process = psutil.Process(root)
    return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))


def rate(url: str, model: str, number: int, concurrency: int, root: int) -> dict[str, float]:
    """Calls/s, and CPU milliseconds of the tree of processes of `root` for each. Every answer is checked."""

    async def one(session: aiohttp.ClientSession, text: str) -> None:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        async with session.post(f"http://127.0.0.1:{port_of(url)}{CHAT}", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            assert answer["choices"][0]["message"]["content"].endswith(text), answer

    async def all_of_them() -> None:
        connector = aiohttp.TCPConnector(limit=concurrency)
        async with aiohttp.ClientSession(connector=connector) as session:
            await asyncio.gather(*(one(session, f"call {i}") for i in range(number)))

    started, before_s = time.perf_counter(), cpu_s(root)
    asyncio.run(all_of_them())
    taken_s = time.perf_counter() - started
    return {"calls_per_s": number / taken_s, "cpu_ms_per_call": (cpu_s(root) - before_s) / number * MS}


async def one_stream(port: int, body: dict[str, Any]) -> tuple[float, int]:
    """Seconds until the first event, and how many words came."""
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    told, first_s = b"", 0.0
    while piece := await reader.read(1 << 16):
        told += piece
        first_s = first_s or (time.perf_counter() - started if b"data:" in told else 0.0)
    writer.close()
    assert told.count(b"[DONE]") == 1, told[:500]
    return first_s, told.count(b'"content":"w')


def streams(url: str, model: str, number: int) -> dict[str, float]:
    words = " ".join(f"w{i}" for i in range(NUM_WORDS))

    async def all_at_once() -> list[tuple[float, int]]:
        bodies = [
            {"model": model, "stream": True, "messages": [{"role": "user", "content": f"{i} {words}"}]}
            for i in range(number)
        ]
        return await asyncio.gather(*(one_stream(port_of(url), body) for body in bodies))

    started = time.perf_counter()
    ended = asyncio.run(all_at_once())
    return {
        "first_event_p50_ms": float(np.median([first_s for first_s, _ in ended])) * MS,
        "seconds": time.perf_counter() - started,
        "events_lost": number * NUM_WORDS - sum(words for _, words in ended),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", required=True)
    parser.add_argument("--prompts", required=True, help="Parquet with a column prompt")
    parser.add_argument("--calls", type=int, default=155, help="prompts, of which five are warm-up")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rate-calls", type=int, default=640, help="calls of each way and round, at --concurrency")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--upstream", help="URL of a running upstream, which the other gateways call")
    parser.add_argument("--litellm", help="URL of LiteLLM's proxy, whose model auto is the upstream's")
    parser.add_argument("--switchyard", help="URL of Switchyard's server, likewise")
    options = parser.parse_args(arguments)
    router = Router.load(options.router)
    prompts = pq.read_table(options.prompts, columns=["prompt"])["prompt"].to_pylist()
    random.Random(0).shuffle(prompts)
    report: dict[str, Any] = {"benchmark": "gateway"}
    with tempfile.TemporaryDirectory() as folder:
        running = contextlib.nullcontext(options.upstream) if options.upstream else upstream(0.0)
        with running as url, serving(options.router, **flags(router, url, folder)) as served:
            report["added"] = added(served.url, url, prompts[: options.calls])
            say(json.dumps(report["added"]))
            ways = ways_to(url, served.url, router)
            ways |= {peer: (at, "auto") for peer in PEERS if (at := getattr(options, peer))}
            report["compared"] = compared(ways, prompts[: options.calls])
            say(json.dumps(report["compared"]))
            roots = {way: served.process.pid if at[0] == served.url else listener(at[0]) for way, at in ways.items()}
            report["rates"] = []
            for _ in range(options.rounds):
                told = {way: rate(*at, options.rate_calls, options.concurrency, roots[way]) for way, at in ways.items()}
                report["rates"].append(told)
                say(json.dumps(told))
        with upstream(0.05) as url, serving(options.router, **flags(router, url, folder)) as served:
            report["streams"] = []
            for _ in range(options.rounds):
                ways = ways_to(url, served.url, router)
                told = {way: streams(*at, options.streams) for way, at in ways.items()}
                report["streams"].append(told)
                say(json.dumps(told))
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()

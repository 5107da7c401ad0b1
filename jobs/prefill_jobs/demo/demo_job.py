"""`demo`: runs every step end to end, on published answers or on simulated ones."""

from __future__ import annotations

from prefill_jobs.demo import published_answers, simulation
from prefill_jobs.demo.walkthrough import Inputs, console, step, walk
from prefill_jobs.option_fields import names_in
from prefill_jobs.options import DemoConfig
from prefill_router import storage
from prefill_router.common.addresses import require_free
from prefill_router.common.errors import UserError
from prefill_router.encoder.encoder_spec import EncoderSize


def demo(config: DemoConfig) -> None:
    """Writes the data, and takes every step on it. Raises UserError if the data are not installed."""
    if "prompts" in config.model_fields_set and not config.simulated:
        raise UserError("--prompts is for --simulated: use --limit to read fewer prompts")
    require_free(config.port)
    walk(_simulated(config) if config.simulated else _published(config), config)


def _published(config: DemoConfig) -> Inputs:
    step("Prompts: nine benchmarks, answered by three models")
    console.print(published_answers.NOTICE)
    corpus, outcomes, pool = published_answers.write(config.out, config.limit)
    shallowest = min(EncoderSize.of(encoder).num_layers for encoder in names_in(config.encoder))
    half = range(shallowest // 2 + 1)
    return Inputs(corpus, outcomes, pool, published_answers.NOTICE, layers=",".join(map(str, half)))


def _simulated(config: DemoConfig) -> Inputs:
    step(f"Prompts: {config.prompts:,} from reasoning-gym; answers of five simulated targets")
    console.print(simulation.NOTICE)
    data = simulation.simulate(config.prompts, config.seed)
    corpus_uri, outcomes_uri, pool_uri = (
        storage.join(config.out, name) for name in ("corpus.parquet", "outcomes.parquet", "pool.toml")
    )
    storage.write_bytes(corpus_uri, storage.encode_parquet(data.corpus))
    storage.write_bytes(outcomes_uri, storage.encode_parquet(data.outcomes))
    storage.write_bytes(pool_uri, data.pool_toml.encode())
    return Inputs(corpus_uri, outcomes_uri, pool_uri, simulation.NOTICE)

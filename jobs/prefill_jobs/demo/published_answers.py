"""The demo's data: answers of three real models to 3,609 prompts of nine benchmarks, with their rewards and costs.

They are in the package paretobandit on PyPI (Apache License 2.0), which is read and not imported. Its files are in
random order, so the first N prompts are a random sample.
"""

from __future__ import annotations

from importlib.util import find_spec

from prefill_jobs.ingest_job import ingest
from prefill_jobs.options import IngestConfig
from prefill_router import storage
from prefill_router.common.errors import UserError
from prefill_router.ingest.tables import CORPUS_FOLDER, OUTCOMES_FOLDER

NOTICE = (
    "Real answers of three models to prompts of MMLU, GSM8K, ARC, HellaSwag, OpenBookQA, TruthfulQA, WinoGrande, MBPP "
    "and BBH, from the package paretobandit (Apache License 2.0). An answer's reward is the mean grade, from 0 to 1, "
    "that judges gave it."
)

# Every published cost is a whole number of tokens at these prices.
POOL_TOML = """\
# USD per million tokens, when the answers were collected.

[[published]]
name = "meta-llama/llama-3.1-8b-instruct"
input_price = 0.1
output_price = 0.1

[[published]]
name = "mistralai/mistral-large-2512"
input_price = 0.5
output_price = 1.5

[[published]]
name = "google/gemini-2.5-pro"
input_price = 1.25
output_price = 10.0
"""

_PACKAGE = "pareto_bandit"


def write(out: str, limit: int | None) -> tuple[str, str, str]:
    """Writes the first `limit` prompts, their outcomes and the pool below `out`, and returns the URIs of the three.

    Raises UserError if the package is not installed.
    """
    if find_spec(_PACKAGE) is None:
        raise UserError(
            "demo: the published answers are not installed: pip install --no-deps paretobandit==0.1.1, or pass "
            "--simulated"
        )
    data, pool = storage.join(out, "data"), storage.join(out, "pool.toml")
    source = f"package:{_PACKAGE}/data/examples"
    ingest(IngestConfig(format="paretobandit", source=source, out=data, limit=limit, overwrite=True))
    storage.write_bytes(pool, POOL_TOML.encode())
    return storage.join(data, CORPUS_FOLDER), storage.join(data, OUTCOMES_FOLDER), pool

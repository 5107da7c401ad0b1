"""The demo's data: real prompts from reasoning-gym, and five targets whose graded answers are simulated.

The answers follow item response theory: the probability of a right answer grows with the target's skill in the prompt's
area minus the prompt's difficulty. All parameters are below. Every simulated target has the prefix `simulated/` in its
name, so that no figure computed from them can be mistaken for a measurement of a real model.
"""

# N prompts, T targets

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prefill_router.common.errors import UserError
from prefill_router.common.schema import CORRECT, OUTCOMES, OUTPUT_TOKENS, PROMPT, PROMPT_ID, TARGET

NOTICE = (
    "Simulated answers: the prompts are real, but no model answered them. Skills and prices are stated, not measured."
)

# Families of prompts by area of skill, each with its difficulty in logits at level 0.
FAMILIES: dict[str, dict[str, float]] = {
    "arithmetic": {
        "basic_arithmetic": 0.0,
        "chain_sum": -0.6,
        "count_bits": 0.8,
        "decimal_chain_sum": 0.1,
        "fraction_simplification": 0.2,
        "gcd": -0.2,
        "lcm": 0.0,
        "leg_counting": 0.3,
        "prime_factorization": 0.4,
        "products": 0.5,
    },
    "algebra": {
        "advanced_geometry": 0.9,
        "bitwise_arithmetic": 1.1,
        "complex_arithmetic": 0.6,
        "number_sequence": 0.7,
        "power_function": 0.5,
        "simple_equations": 0.1,
    },
    "logic": {
        "aiw": 0.2,
        "coin_flip": -0.4,
        "family_relationships": 0.1,
        "knights_knaves": 0.9,
        "propositional_logic": 0.7,
        "syllogism": 0.2,
    },
    "language": {
        "letter_counting": 0.5,
        "sentence_reordering": 0.1,
        "spell_backward": 0.3,
        "word_sequence_reversal": 0.4,
        "word_sorting": 0.2,
    },
    "calendar": {
        "calendar_arithmetic": 0.4,
        "time_intervals": 0.3,
    },
}
LEVELS = 4
LOGITS_PER_LEVEL = 0.6
DISCRIMINATION = 1.6

AREAS = list(FAMILIES)


@dataclass(frozen=True)
class SimulatedTarget:
    """Prices in USD per million tokens; `skills` in logits, in the order of AREAS; `base_tokens` at difficulty 0."""

    name: str
    input_price: float
    output_price: float
    skills: tuple[float, ...]
    base_tokens: float


TARGETS = [
    SimulatedTarget("simulated/atlas", 2.5, 10.0, (1.6, 1.5, 1.5, 1.5, 1.7), 130.0),
    SimulatedTarget("simulated/sage", 0.8, 3.2, (0.7, 0.5, 2.3, 1.2, 1.9), 160.0),
    SimulatedTarget("simulated/abacus", 0.3, 1.2, (2.5, 2.4, -0.4, -0.8, 0.6), 150.0),
    SimulatedTarget("simulated/scribe", 0.2, 0.8, (-0.3, -1.0, 0.4, 2.4, 0.3), 80.0),
    SimulatedTarget("simulated/sprite", 0.05, 0.2, (0.2, -0.7, -0.2, 0.1, -0.3), 60.0),
]


@dataclass(frozen=True)
class Simulated:
    """A corpus, its outcomes, and the pool as TOML."""

    corpus: pa.Table
    outcomes: pa.Table
    pool_toml: str


def simulate(num_prompts: int, seed: int) -> Simulated:
    """Generates `num_prompts` prompts, spread evenly over families and levels of difficulty, and their outcomes."""
    rng = np.random.default_rng(seed)
    cells = [(area, family, level) for area in AREAS for family in FAMILIES[area] for level in range(LEVELS)]
    sizes = [len(part) for part in np.array_split(np.arange(num_prompts), len(cells))]
    prompts: list[dict[str, Any]] = []
    outcomes: list[dict[str, Any]] = []
    for (area, family, level), size in zip(cells, sizes, strict=True):
        for i, question in enumerate(_questions(family, level, size, seed)):
            prompt_id = f"{family}-{level}-{i:03d}"
            prompts.append({PROMPT_ID: prompt_id, PROMPT: question, "family": family, "level": level})
            difficulty = FAMILIES[area][family] + LOGITS_PER_LEVEL * level
            outcomes += [{PROMPT_ID: prompt_id, **_answer(t, area, difficulty, rng)} for t in TARGETS]
    return Simulated(pa.Table.from_pylist(prompts), pa.Table.from_pylist(outcomes, schema=OUTCOMES), _pool_toml())


def _answer(target: SimulatedTarget, area: str, difficulty: float, rng: np.random.Generator) -> dict[str, Any]:
    ability = target.skills[AREAS.index(area)] - difficulty
    is_correct = rng.random() < 1.0 / (1.0 + np.exp(-DISCRIMINATION * ability))
    # Harder prompts get longer answers; the noise is the spread between answers to similar prompts.
    tokens = target.base_tokens * np.exp(0.4 * difficulty + 0.25 * rng.standard_normal())
    return {TARGET: target.name, CORRECT: float(is_correct), OUTPUT_TOKENS: max(1, round(tokens))}


def _questions(family: str, level: int, size: int, seed: int) -> list[str]:
    try:
        from reasoning_gym import factory
    except ImportError:
        raise UserError("demo: reasoning-gym is not installed: pip install 'prefill-router[demo]'") from None
    curriculum = factory.create_curriculum(family)
    for name, attribute in curriculum.attributes.items():
        curriculum.set_attr_level(name, min(level, len(attribute.levels) - 1))
    settings = vars(curriculum.generate_configuration({"size": size, "seed": seed * LEVELS + level}))
    dataset = factory.create_dataset(family, **settings)
    return [dataset[i]["question"] for i in range(size)]


def _pool_toml() -> str:
    """The pool file."""
    entries = [
        f'[[simulated]]\nname = "{t.name}"\ninput_price = {t.input_price}\noutput_price = {t.output_price}\n'
        for t in TARGETS
    ]
    return f"# {NOTICE}\n# USD per million tokens.\n\n" + "\n".join(entries)

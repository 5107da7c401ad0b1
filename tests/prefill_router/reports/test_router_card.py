from __future__ import annotations

from dataclasses import replace

from prefill_router.policy.token_prices import PriceTier
from prefill_router.reports.router_card import card
from prefill_router.router.artifact import Router


def test_a_card_without_training_information(tiny_router: Router) -> None:
    about, targets = card(tiny_router)
    rows = dict(about)
    assert rows["router"] == f"{tiny_router.version}, format 1"
    assert rows["kernel"] == "7 prompts, weight 0.25 in P(correct)"
    assert "training" not in rows
    assert targets[1:] == [
        ("big", "$2.00", "$8.00", "-", "-", "none", "-"),
        ("small", "$0.100", "$0.400", "-", "-", "none", "-"),
    ]


def test_a_card_says_where_prices_come_from_and_where_they_change(tiny_router: Router) -> None:
    tier = PriceTier(above=272_000, input_price=5.0, output_price=20.0)
    big = tiny_router.pool.targets[0]
    big = big.model_copy(update={"price_from": "openai/gpt-5.4", "price_table": "genai-prices 0.2.3", "tiers": (tier,)})
    pool = tiny_router.pool.model_copy(update={"targets": (big, *tiny_router.pool.targets[1:])})
    rows = dict(card(replace(tiny_router, pool=pool))[0])
    assert rows["prices"] == "big openai/gpt-5.4 (genai-prices 0.2.3)"
    assert rows["long inputs"] == "other prices above: big 272,000 tokens"


def test_a_card_shows_training_and_validation_scores(tiny_router: Router) -> None:
    training = {
        "recipe": "best",
        "num_train": 1200,
        "num_validation": 200,
        "num_answers": {"big": 1100, "small": 1200},
        "columns": {"big": "last_002", "small": "mean_003"},
        "validation": {
            "accuracy": 0.75,
            "best_single_accuracy": 0.7,
            "oracle_accuracy": 0.9,
            "cost": 0.0005,
            "best_single_cost": 0.001,
            "auc": {"big": 0.7, "small": None},
        },
        "extends": "0123",
    }
    about, targets = card(replace(tiny_router, training=training))
    rows = dict(about)
    assert rows["extends"] == "0123"
    assert rows["training"] == "recipe best, 1,200 prompts"
    assert rows["validation"] == "200 prompts, which the figures below are of; evaluate has held-out ones"
    assert rows["accuracy"] == "75.0% (best single target 70.0%, oracle 90.0%)"
    assert rows["cost"] == "$0.500 per 1,000 prompts (best single target $1.00)"
    assert targets[1] == ("big", "$2.00", "$8.00", "1,100", "0.700", "none", "last_002")
    assert targets[2] == ("small", "$0.100", "$0.400", "1,200", "-", "none", "mean_003")


def test_a_card_shows_prices_per_answer_and_the_billed_share(tiny_router: Router) -> None:
    big, small = tiny_router.pool.targets
    pool = tiny_router.pool.model_copy(update={"targets": (big.model_copy(update={"usd_per_answer": 0.25}), small)})
    names = ("accuracy", "best_single_accuracy", "oracle_accuracy", "cost", "best_single_cost")
    validation = {**dict.fromkeys(names, 0.5), "billed_share": 0.75}
    rows = dict(card(replace(tiny_router, pool=pool, training={"validation": validation}))[0])
    assert (rows["per answer"], rows["billed"]) == ("big $0.250", "75.0% of the costs")
    assert "billed" not in dict(card(tiny_router)[0])


def test_a_card_on_judged_rewards_states_mean_rewards_and_their_threshold(tiny_router: Router) -> None:
    names = ("accuracy", "best_single_accuracy", "oracle_accuracy", "cost", "best_single_cost")
    training = {"validation": {**dict.fromkeys(names, 0.5), "is_judged": True}}
    assert "mean reward" in dict(card(replace(tiny_router, training=training))[0])
    assert dict(card(replace(tiny_router, training={"correct_at": 0.8}))[0])["right from"] == "a reward of 0.8"

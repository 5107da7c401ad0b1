from __future__ import annotations

from dataclasses import replace

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
    assert rows["validation"] == "200 prompts"
    assert rows["accuracy"] == "75.0% (best single target 70.0%, oracle 90.0%)"
    assert rows["cost"] == "$0.500 per 1,000 prompts (best single target $1.00)"
    assert targets[1] == ("big", "$2.00", "$8.00", "1,100", "0.700", "none", "last_002")
    assert targets[2] == ("small", "$0.100", "$0.400", "1,200", "-", "none", "mean_003")

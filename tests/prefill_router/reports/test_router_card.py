from __future__ import annotations

from dataclasses import replace

from prefill_router.reports.router_card import card
from prefill_router.router.artifact import Router


def test_a_card_of_a_router_of_which_little_is_told(tiny_router: Router) -> None:
    about, targets = card(tiny_router)
    told = dict(about)
    assert told["router"] == f"{tiny_router.version}, format 1"
    assert told["kernel"] == "7 prompts, weight 0.25 beside the trunk"
    assert "trained" not in told
    assert targets[1:] == [
        ("big", "$2.00", "$8.00", "-", "-", "none", "-"),
        ("small", "$0.100", "$0.400", "-", "-", "none", "-"),
    ]


def test_a_card_tells_training_and_how_good_it_was(tiny_router: Router) -> None:
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
    told = dict(about)
    assert told["extends"] == "0123"
    assert told["trained"] == "by recipe best, on 1,200 prompts"
    assert told["accuracy"] == "75.0%, the best single target 70.0%, an oracle 90.0%"
    assert told["cost"] == "$0.500 a thousand prompts, the best single target $1.00"
    assert targets[1] == ("big", "$2.00", "$8.00", "1,100", "0.700", "none", "last_002")
    assert targets[2] == ("small", "$0.100", "$0.400", "1,200", "-", "none", "mean_003")

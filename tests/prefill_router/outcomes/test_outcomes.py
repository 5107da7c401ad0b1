from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefill_router.common.errors import UserError
from prefill_router.corpus.split import prompt_hashes
from prefill_router.evaluation.off_policy import load_log
from prefill_router.outcomes import Outcomes, load_outcomes, target_names

NAN = float("nan")
# The target "other" is in no pool; (q, small) and (r, big) are missing.
COLUMNS: dict[str, Any] = {
    "prompt_id": ["p", "p", "q", "r", "r"],
    "target": ["big", "small", "big", "small", "other"],
    "correct": pa.array([1.0, 0.0, 0.5, 1.0, 1.0], pa.float32()),
    "output_tokens": pa.array([10, 20, None, 40, 50], pa.int32()),
}


def write(path: Path, **changes: Any) -> str:
    """Writes COLUMNS with changes as Parquet; a column changed to None is left out."""
    columns = {name: values for name, values in {**COLUMNS, **changes}.items() if values is not None}
    pq.write_table(pa.table(columns), path)
    return str(path)


def load(path: Path, **changes: Any) -> Outcomes:
    return load_outcomes(write(path / "outcomes.parquet", **changes), ["big", "small"])


def test_align_gives_the_order_asked_for_and_nan_for_what_is_missing(tmp_path: Path) -> None:
    outcomes = load(tmp_path).align(["r", "never graded", "p", "q"])
    np.testing.assert_array_equal(outcomes.correct, [[NAN, 1.0], [NAN, NAN], [1.0, 0.0], [0.5, NAN]])
    np.testing.assert_array_equal(outcomes.output_tokens, [[NAN, 40], [NAN, NAN], [10, 20], [NAN, NAN]])
    assert outcomes.correct.dtype == outcomes.output_tokens.dtype == np.float32


def test_targets_stand_in_the_order_of_the_pool(tmp_path: Path) -> None:
    uri = write(tmp_path / "outcomes.parquet")
    correct = load_outcomes(uri, ["small", "big"]).align(["p"]).correct
    np.testing.assert_array_equal(correct, [[0.0, 1.0]])


def test_targets_outside_the_pool_are_counted(tmp_path: Path) -> None:
    assert load(tmp_path).num_other_targets == 1
    assert load_outcomes(write(tmp_path / "outcomes.parquet"), ["big"]).num_other_targets == 2


def test_an_outcome_without_a_grade_is_missing(tmp_path: Path) -> None:
    outcomes = load(tmp_path, correct=pa.array([None, 0.0, 1.0, 1.0, 1.0], pa.float32())).align(["p"])
    np.testing.assert_array_equal(outcomes.correct, [[NAN, 0.0]])
    np.testing.assert_array_equal(outcomes.output_tokens, [[NAN, 20]])


def test_lengths_may_be_left_out(tmp_path: Path) -> None:
    outcomes = load(tmp_path, output_tokens=None)
    assert np.isnan(outcomes.output_tokens).all()
    assert outcomes.output_tokens.shape == outcomes.correct.shape


def test_billed_costs_are_read_where_they_are_known(tmp_path: Path) -> None:
    outcomes = load(tmp_path, cost_usd=[0.25, None, 0.0, 0.5, 0.75])
    np.testing.assert_array_equal(outcomes.align(["p", "q", "r"]).cost_usd, [[0.25, NAN], [0.0, NAN], [NAN, 0.5]])
    np.testing.assert_array_equal(outcomes.of_first(1).align(["p"]).cost_usd, [[0.25]])
    assert np.isnan(load(tmp_path).cost_usd).all()


@pytest.mark.parametrize(("value", "shown"), [(-0.5, "-0.5"), (float("inf"), "inf"), (NAN, "nan")])
def test_a_cost_that_is_no_amount_is_an_error(tmp_path: Path, value: float, shown: str) -> None:
    message = f'prompt "p", target "small": cost_usd = {shown}, must be finite and >= 0, or null'
    with pytest.raises(UserError, match=message):
        load(tmp_path, cost_usd=[0.25, value, None, 0.5, 0.75])


@pytest.mark.parametrize("text", [pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
@pytest.mark.parametrize("number", [pa.float64(), pa.bool_(), pa.int64()])
def test_other_types_that_say_the_same_are_read(tmp_path: Path, text: pa.DataType, number: pa.DataType) -> None:
    whole = pa.array([1, 0, 1, 1, 1]).cast(number)
    changed = load(
        tmp_path,
        prompt_id=pa.array(COLUMNS["prompt_id"]).cast(text),
        target=pa.array(COLUMNS["target"]).cast(text),
        correct=whole,
        output_tokens=COLUMNS["output_tokens"].cast(pa.int64()),
    ).align(["p", "q", "r"])
    np.testing.assert_array_equal(changed.correct, [[1, 0], [1, NAN], [NAN, 1]])
    np.testing.assert_array_equal(changed.output_tokens, [[10, 20], [NAN, NAN], [NAN, 40]])


def test_a_folder_is_one_table(tmp_path: Path) -> None:
    for i in range(5):
        row = {name: values[i : i + 1] for name, values in COLUMNS.items()}
        write(tmp_path / f"{i}.parquet", **row, **({"note": ["x"]} if i == 2 else {}))
    (tmp_path / "notes.txt").write_text("no outcomes")
    whole = load_outcomes(str(tmp_path), ["big", "small"]).align(["p", "q", "r"])
    np.testing.assert_array_equal(whole.correct, [[1.0, 0.0], [0.5, NAN], [NAN, 1.0]])


def test_check_known_names_a_prompt_that_has_no_activations(tmp_path: Path) -> None:
    outcomes = load(tmp_path)
    assert outcomes.check_known(prompt_hashes(["p", "q", "r", "more"]), ignore_unknown=False) == 0
    with pytest.raises(UserError, match=r'outcomes\.parquet: prompt_id "q" has .*2 such prompts.*--ignore-unknown'):
        outcomes.check_known(prompt_hashes(["p"]), ignore_unknown=False)
    assert outcomes.check_known(prompt_hashes(["p"]), ignore_unknown=True) == 2


def test_the_first_targets_alone(tmp_path: Path) -> None:
    first = load(tmp_path).of_first(1)
    assert first.targets == ["big"]
    np.testing.assert_array_equal(first.align(["p", "q"]).correct, [[1.0], [0.5]])


def test_many_pieces_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(tmp_path)
    monkeypatch.setattr("prefill_router.outcomes.outcome_tables._BATCH_ROWS", 1)
    pieces = load(tmp_path)
    np.testing.assert_array_equal(pieces.keys, whole.keys)
    np.testing.assert_array_equal(pieces.correct, whole.correct)
    assert pieces.num_other_targets == whole.num_other_targets


def test_all_targets_of_a_table_have_names(tmp_path: Path) -> None:
    assert target_names(write(tmp_path / "outcomes.parquet")) == ["big", "other", "small"]


@pytest.mark.parametrize("column", ["prompt_id", "target", "correct"])
def test_a_missing_column_is_named_beside_those_there(tmp_path: Path, column: str) -> None:
    with pytest.raises(UserError, match=rf"outcomes\.parquet: column {column} is missing; it has .*output_tokens"):
        load(tmp_path, **{column: None})


@pytest.mark.parametrize(("value", "shown"), [(1.5, "1.5"), (-0.25, "-0.25"), (NAN, "nan"), (float("inf"), "inf")])
def test_a_grade_outside_0_to_1_is_an_error(tmp_path: Path, value: float, shown: str) -> None:
    correct = pa.array([1.0, 0.0, value, 1.0, 1.0], pa.float32())
    with pytest.raises(UserError, match=rf'prompt "q", target "big": correct = {shown}, must be in \[0, 1\]'):
        load(tmp_path, correct=correct)


def test_a_length_below_zero_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'prompt "p", target "small": output_tokens = -1, must be'):
        load(tmp_path, output_tokens=pa.array([10, -1, None, 40, 50], pa.int32()))


def test_a_pair_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='prompt "p", target "big" has more than one outcome'):
        load(tmp_path, target=["big", "big", "big", "small", "other"])


def test_a_target_without_outcomes_is_an_error(tmp_path: Path) -> None:
    uri = write(tmp_path / "outcomes.parquet")
    with pytest.raises(UserError, match=r'target "smal" of the pool has no outcome: .* use only big, other, small'):
        load_outcomes(uri, ["big", "smal"])


def test_a_target_that_was_never_graded_has_no_outcome(tmp_path: Path) -> None:
    correct = pa.array([None, 0.0, None, 1.0, 1.0], pa.float32())
    with pytest.raises(UserError, match='target "big" of the pool has no outcome'):
        load(tmp_path, correct=correct)


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("correct", ["yes", "no", "yes", "no", "no"], "float"),
        ("output_tokens", [1.5, 2.0, 3.0, 4.0, 5.0], "int32"),
        ("output_tokens", [2**40, 2, 3, 4, 5], "int32"),
        ("target", [["big"]] * 5, "string"),
    ],
)
def test_a_column_of_the_wrong_type_is_named(tmp_path: Path, column: str, values: list[Any], kind: str) -> None:
    with pytest.raises(UserError, match=rf"outcomes\.parquet: column {column} must be {kind}"):
        load(tmp_path, **{column: values})


@pytest.mark.parametrize("column", ["prompt_id", "target"])
def test_a_row_without_a_key_is_an_error(tmp_path: Path, column: str) -> None:
    values = [*COLUMNS[column][:4], None]
    with pytest.raises(UserError, match=f"1 rows have no {column}"):
        load(tmp_path, **{column: values})


def test_missing_outcomes_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such outcomes"):
        load_outcomes(str(tmp_path / "nowhere"), ["big"])
    with pytest.raises(UserError, match="has no file of outcomes: pass a file, or a folder of them"):
        load_outcomes(str(tmp_path), ["big"])


def test_a_pair_of_feedback_is_the_mean_of_its_requests_and_a_request_counts_once(tmp_path: Path) -> None:
    rows = {
        "prompt_id": ["p", "p", "p", "q", "q"],
        "target": ["big", "big", "big", "small", "small"],
        "correct": pa.array([1.0, 0.0, 0.5, 1.0, 0.0], pa.float32()),
        "output_tokens": pa.array([10, None, 30, 5, 5], pa.int32()),
        "cost_usd": [0.25, None, 0.75, None, None],
        "request_id": ["a", "b", "c", "d", "d"],
    }
    write(tmp_path / "1.parquet", **rows)
    write(tmp_path / "2.parquet", **rows)  # as an interrupted merge leaves them
    outcomes = load_outcomes(str(tmp_path), ["big", "small"]).align(["p", "q"])
    np.testing.assert_allclose(outcomes.correct, [[0.5, NAN], [NAN, 1.0]])
    np.testing.assert_allclose(outcomes.output_tokens, [[20.0, NAN], [NAN, 5.0]])
    np.testing.assert_allclose(outcomes.cost_usd, [[0.5, NAN], [NAN, NAN]])


def test_rewards_count_as_right_from_a_threshold_on(tmp_path: Path) -> None:
    rewards = pa.array([0.7, 0.69, 0.85, 0.0, 1.0], pa.float32())  # the float32 nearest to 0.7 is below 0.7
    uri = write(tmp_path / "outcomes.parquet", correct=rewards)
    correct = load_outcomes(uri, ["big", "small"], correct_at=0.7).align(["p", "q", "r"]).correct
    np.testing.assert_array_equal(correct, [[1.0, 0.0], [1.0, NAN], [NAN, 0.0]])


def test_each_request_of_feedback_counts_as_right_or_wrong_before_their_mean(tmp_path: Path) -> None:
    rows = {
        "prompt_id": ["p", "p", "q"],
        "target": ["big", "big", "big"],
        "correct": [0.9, 0.1, 0.7],
        "output_tokens": None,
        "propensity": [0.5, 0.5, 0.5],
        "request_id": ["a", "b", "c"],
    }
    uri = write(tmp_path / "feedback.parquet", **rows)
    assert load_outcomes(uri, ["big"], correct_at=0.7).align(["p", "q"]).correct.tolist() == [[0.5], [1.0]]
    assert load_log(uri, ["big"], correct_at=0.7)[1].reward.tolist() == [1.0, 0.0, 1.0]
    assert load_log(uri, ["big"])[1].reward.tolist() == [0.9, 0.1, 0.7]


def test_two_callers_may_give_their_requests_one_id(tmp_path: Path) -> None:
    rows = {
        "prompt_id": ["p", "q"],
        "target": ["big", "big"],
        "correct": pa.array([1.0, 0.0], pa.float32()),
        "output_tokens": pa.array([1, 2], pa.int32()),
        "propensity": [0.5, 0.5],
        "request_id": ["same", "same"],
    }
    write(tmp_path / "1.parquet", **rows, call_id=["a", "b"])
    write(tmp_path / "2.parquet", **rows, call_id=["a", "b"])
    assert load_outcomes(str(tmp_path), ["big"]).align(["p", "q"]).correct.tolist() == [[1.0], [0.0]]
    assert load_log(str(tmp_path), ["big"])[1].reward.tolist() == [1.0, 0.0]

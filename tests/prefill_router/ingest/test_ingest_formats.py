"""The formats of `ingest`: a small file of each in its original form, and the exact tables expected from it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpora import write, write_jsonl
from ingested import FIXTURES, ingest
from prefill_router.common.errors import UserError
from prefill_router.corpus.reader import Prompt, content_hash


def ids(prompts: list[Prompt]) -> dict[str, Prompt]:
    """Prompts by their default ids."""
    return {content_hash(prompt): prompt for prompt in prompts}


def test_toolkit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ingest("toolkit", FIXTURES / "toolkit.csv", tmp_path)
    paris, prime = "What is the capital of France?", 'Prove that "2", the number,\nis prime'
    assert found.prompts == ids([paris, prime])
    assert found.outcomes == {
        (content_hash(paris), "nemotron-3-nano-reasoning"): (1.0, 45),
        (content_hash(paris), "gpt-oss-20b-high"): (1.0, 38),
        (content_hash(prime), "nemotron-3-nano-reasoning"): (0.0, 312),
        (content_hash(prime), "gpt-oss-20b-high"): (0.0, None),
    }
    assert found.summary.ignored == {'column "embedding_id"': 1}
    assert capsys.readouterr().err == 'ingest: ignored: column "embedding_id"\n'


def test_toolkit_keeps_where_a_prompt_is_from(tmp_path: Path) -> None:
    csv = write(tmp_path / "t.csv", "question,model,isCorrect,source,category\nhi,m,1,swe,code\n")
    found = ingest("toolkit", csv, tmp_path / "out")
    assert found.extras == {content_hash("hi"): {"category": "code", "source": "swe"}}
    assert found.outcomes == {(content_hash("hi"), "m"): (1.0, None)}


# --- a table of one's own ----------------------------------------------------------------------------------------


WIDE = [
    {"question": "2 + 2?", "small": 1.0, "small_cost_usd": 0.01, "big": True, "big_output_tokens": 7, "note": "easy"},
    {"question": "Prove it.", "small": None, "small_cost_usd": None, "big": 0.25, "big_output_tokens": 90, "note": ""},
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_wide_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"answers{suffix}"
    if suffix == ".csv":
        write(path, "question,small,small_cost_usd,big,big_output_tokens,note\n2 + 2?,1,0.01,true,7,easy\n")
        path.write_text(path.read_text() + "Prove it.,,,0.25,90,\n")
    elif suffix == ".jsonl":
        write_jsonl(path, *WIDE)
    elif suffix == ".json":
        path.write_text(json.dumps(WIDE))
    else:
        pq.write_table(pa.Table.from_pylist([{**row, "big": float(row["big"])} for row in WIDE]), path)
    found = ingest("table", path, tmp_path / "out")
    first, second = content_hash("2 + 2?"), content_hash("Prove it.")
    assert found.prompts == ids(["2 + 2?", "Prove it."])
    assert found.outcomes == {
        (first, "small"): (1.0, None),
        (first, "big"): (1.0, 7),
        (second, "big"): (0.25, 90),
    }
    assert found.costs == {(first, "small"): pytest.approx(0.01)}
    assert found.summary.ignored == {'column "note"': 1}
    assert found.summary.ungraded == 1


def test_a_column_of_other_numbers_is_left_out_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ingest("table", write(tmp_path / "t.csv", "prompt,a,b,note\nhi,1,0,x\nho,0,10,y\n"), tmp_path / "out")
    assert list(found.summary.targets) == ["a"]
    assert capsys.readouterr().err == (
        'ingest: ignored: column "b": 10 is no grade from 0 to 1\ningest: ignored: column "note"\n'
    )


def test_a_table_with_an_embedding_reports_a_bounded_number_of_columns(tmp_path: Path) -> None:
    names, values = ",".join(f"e{i}" for i in range(384)), ",".join(["-1.5"] * 384)
    found = ingest("table", write(tmp_path / "t.csv", f"prompt,a,{names}\nhi,1,{values}\n"), tmp_path / "out")
    assert len(found.summary.ignored) == 64


def test_wide_table_of_pandas_has_nan_for_a_missing_grade(tmp_path: Path) -> None:
    table = pa.table({"id": [7, 8], "prompt": ["a", "b"], "m": [float("nan"), 1.0]})
    pq.write_table(table, tmp_path / "t.parquet")
    found = ingest("table", tmp_path / "t.parquet", tmp_path / "out")
    assert found.prompts == {"7": "a", "8": "b"}
    assert found.outcomes == {("8", "m"): (1.0, None)}


def test_wide_table_of_words(tmp_path: Path) -> None:
    text = "prompt,m,n\na,yes,TRUE\nb,No,NaN\nc,N/A,false\n"
    found = ingest("table", write(tmp_path / "t.csv", text), tmp_path / "out")
    grades = {(content_hash(prompt), name): (grade, None) for prompt, name, grade in (("a", "m", 1.0), ("a", "n", 1.0))}
    grades |= {(content_hash("b"), "m"): (0.0, None), (content_hash("c"), "n"): (0.0, None)}
    assert found.outcomes == grades


def test_a_column_that_comes_twice_is_refused_in_every_format(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array([1.0]), pa.array([0.0])], names=["prompt", "m", "m"])
    pq.write_table(table, tmp_path / "t.parquet")
    for path in (write(tmp_path / "t.csv", "prompt,m,m\na,1,0\n"), tmp_path / "t.parquet"):
        with pytest.raises(UserError, match=f"{path}: has 2 columns m, must have one"):
            ingest("table", path, tmp_path / "out")


@pytest.mark.parametrize("data", ["prompt,m\na,1\n".encode("utf-16-le"), gzip.compress(b"prompt,m\na,1\n", mtime=0)])
def test_a_csv_that_is_no_text_is_refused_in_words(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(UserError, match="is not text in UTF-8: write it so, or if it is compressed, name it"):
        ingest("table", tmp_path / "t.csv", tmp_path / "out")


def test_long_table(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": "p", "messages": [{"role": "user", "content": "hi"}], "model": "m", "score": 0.5, "cost": 0.1},
        {"prompt_id": "p", "messages": [{"role": "user", "content": "hi"}], "model": "n", "score": 2, "cost": 0.1},
    ]
    found = ingest("table", write_jsonl(tmp_path / "t.jsonl", *rows), tmp_path / "out")
    assert found.prompts == {"p": [{"role": "user", "content": "hi"}]}
    assert found.outcomes == {("p", "m"): (0.5, None)}
    assert found.costs == {("p", "m"): pytest.approx(0.1)}
    assert found.quarantine == [
        ("t.jsonl", 1, "p", 'target "n": correct = 2, must be in [0, 1], true, false, yes or no'),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,m\nhi,1\n", "has no column of prompts: name it prompt or messages; it has a, m"),
        ("prompt,m\nhi,4\nho,5\n", 'has no column of grades: .* it has m = "4"'),
        ("prompt,m\nhi,1\nho,85%\n", 'has no column of grades: .* it has m = "85%"'),
        ("prompt\nhi\n", "has no column of grades: .* it has prompts alone"),
    ],
)
def test_table_without_prompts_or_grades(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ingest("table", write(tmp_path / "t.csv", text), tmp_path / "out")


# --- MMLU-Pro ----------------------------------------------------------------------------------------------------

MMLU_PRO = (FIXTURES / "mmlu_pro.json").read_text()
MMLU_PRO_PROMPTS = {
    "mmlu-pro-70": "Which one divides?\n\nA. a muscle\nB. a shoot tip",
    "mmlu-pro-71": "Which of them holds DNA?\n\nA. a nucleus\nB. a wall\nC. sap",
    "mmlu-pro-72": "Which of them is alive?\n\nA. a cell\nB. a stone",
    "mmlu-pro-73": "Which of them is dead?\n\nA. a cell\nB. a stone",
}


def zipped(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def mmlu_pro_outcomes(target: str) -> dict[tuple[str, str], tuple[float, None]]:
    """An answer without a letter is wrong; no answer at all is ungraded."""
    return {("mmlu-pro-70", target): (1.0, None), ("mmlu-pro-71", target): (0.0, None)} | {
        ("mmlu-pro-72", target): (0.0, None)
    }


def test_mmlu_pro(tmp_path: Path) -> None:
    source = tmp_path / "eval_results"
    source.mkdir()
    members = {
        "../../model_outputs.json": MMLU_PRO,
        "summary.json": '{"biology": {"acc": 0.5}}',
        "__MACOSX/m.json": "?",
    }
    zipped(source / "model_outputs_Meta-Llama-3_1-8B_5shots.zip", **members)
    by_subject = {"biology_result.json": MMLU_PRO, "notes.txt": "-"}
    zipped(source / "model_outputs_gpt-4o_0shots.json.zip", **by_subject)
    write(source / "business_summary.json", '{"total": {"acc": 0.5}}')
    found = ingest("mmlu-pro", source, tmp_path / "out")
    assert found.prompts == MMLU_PRO_PROMPTS
    assert found.outcomes == mmlu_pro_outcomes("Meta-Llama-3_1-8B") | mmlu_pro_outcomes("gpt-4o")
    assert found.extras["mmlu-pro-70"] == {"category": "biology", "source": "ori_mmlu-anatomy"}
    assert (found.summary.ungraded, found.summary.quarantined) == (2, 0)
    assert found.summary.ignored == {'file "notes.txt" in a zip': 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_results", "out"]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("model_outputs_gpt-4o_5shots.json", "gpt-4o"),
        ("gpt4o/biology_result.json", "gpt4o"),
        ("Llama-2-7b-hf/CoT/all/biology.json", "Llama-2-7b-hf"),
    ],
)
def test_mmlu_pro_as_json(tmp_path: Path, name: str, target: str) -> None:
    path = tmp_path / "results" / name
    path.parent.mkdir(parents=True)
    write(path, json.dumps({"biology": json.loads(MMLU_PRO)}))
    found = ingest("mmlu-pro", tmp_path / "results", tmp_path / "out")
    assert found.outcomes == mmlu_pro_outcomes(target)


def test_a_target_that_only_the_user_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "answers.json", MMLU_PRO)
    with pytest.raises(UserError, match=r"answers.json: unknown model: .*: set --target"):
        ingest("mmlu-pro", path, tmp_path / "out")
    assert ingest("mmlu-pro", path, tmp_path / "out", target="gpt-4o").outcomes == mmlu_pro_outcomes("gpt-4o")


# --- RouterBench -------------------------------------------------------------------------------------------------

ROUTERBENCH_PROMPTS = {
    "mmlu-anatomy.val.1": "Answer with the letter.\n\nWhich is a bone?\nA) ulna\nB) liver",
    "mtbench-2.dev.3": "It's a poem\n\nNow shorten it",
}
ROUTERBENCH_OUTCOMES = {
    ("mmlu-anatomy.val.1", "claude-v2"): (1.0, None),
    ("mmlu-anatomy.val.1", "mistralai/mistral-7b-chat"): (0.0, None),
    ("mtbench-2.dev.3", "claude-v2"): (0.75, None),
}


def test_routerbench(tmp_path: Path) -> None:
    found = ingest("routerbench", FIXTURES / "routerbench.csv", tmp_path)
    assert (found.prompts, found.outcomes) == (ROUTERBENCH_PROMPTS, ROUTERBENCH_OUTCOMES)
    assert found.costs == {
        ("mmlu-anatomy.val.1", "claude-v2"): 0.00059,
        ("mmlu-anatomy.val.1", "mistralai/mistral-7b-chat"): 0.0000146,
        ("mtbench-2.dev.3", "claude-v2"): 0.001,
    }
    assert found.extras["mtbench-2.dev.3"] == {"category": "mtbench"}
    assert (found.summary.ungraded, found.summary.ignored) == (1, {})


@pytest.mark.parametrize("as_list", [False, True])
def test_routerbench_as_parquet(tmp_path: Path, as_list: bool) -> None:
    prompts = [["one"], ["it's", "two\nlines"]]
    table = {
        "sample_id": ["a", "b"],
        "prompt": prompts if as_list else [str(turns) for turns in prompts],
        "eval_name": ["x", "x"],
        "m": [0.25, float("nan")],
        "m|total_cost": [float("nan"), 0.2],
        "embedding": [[1.0], [2.0]],
    }
    pq.write_table(pa.table(table), tmp_path / "r.parquet")
    found = ingest("routerbench", tmp_path / "r.parquet", tmp_path / "out")
    assert found.prompts == {"a": "one", "b": "it's\n\ntwo\nlines"}
    assert (found.outcomes, found.costs) == ({("a", "m"): (0.25, None)}, {})
    assert (found.summary.ungraded, found.summary.ignored) == (1, {'column "embedding"': 1})


def test_routerbench_in_its_long_form(tmp_path: Path) -> None:
    lines = ["sample_id,prompt,eval_name,model_name,performance,model_response,cost"]
    lines += ["a,['one'],x,m,1.0,yes,0.1", "a,['one'],x,n,0.5,no,0.1", "b,[no list,x,m,0,-,0"]
    found = ingest("routerbench", write(tmp_path / "raw.csv", "\n".join(lines)), tmp_path / "out")
    assert found.prompts == {"a": "one", "b": "[no list"}
    assert found.outcomes == {("a", "m"): (1.0, None), ("a", "n"): (0.5, None), ("b", "m"): (0.0, None)}
    assert found.costs == {("a", "m"): 0.1, ("a", "n"): 0.1, ("b", "m"): 0.0}


@pytest.mark.parametrize("cost", ["-0.1", "inf", "dear"])
def test_an_answer_with_an_impossible_cost_goes_to_the_quarantine(tmp_path: Path, cost: str) -> None:
    lines = ["sample_id,prompt,m,m|total_cost", "a,one,1,0.1", f"b,two,1,{cost}"]
    found = ingest("routerbench", write(tmp_path / "r.csv", "\n".join(lines)), tmp_path / "out")
    assert found.costs == {("a", "m"): 0.1}
    ((_, row, prompt_id, reason),) = found.quarantine
    assert (row, prompt_id) == (1, "b")
    assert re.search(r'target "m": cost_usd = "?.+, must be a finite number, 0 or more', reason)


@pytest.mark.parametrize("format_name", ["routerbench", "toolkit"])
def test_a_pickle_is_refused(tmp_path: Path, format_name: str) -> None:
    pickle = write(tmp_path / "routerbench_0shot.pkl", b"\x80\x04N.")
    for source in (pickle, tmp_path):
        with pytest.raises(
            UserError, match=r"routerbench_0shot.pkl: pickle files are not read, .* export it with pandas"
        ):
            ingest(format_name, source, tmp_path / "out")


# --- RouteLLM ----------------------------------------------------------------------------------------------------


def test_routellm(tmp_path: Path) -> None:
    found = ingest("routellm", FIXTURES / "routellm", tmp_path)
    bone = "Which of the following is a bone?\nA. Ulna\nB. Liver\nAnswer:"
    robe = "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?"
    assert found.prompts == ids([robe, bone])
    assert found.outcomes == {
        (content_hash(bone), "mixtral-8x7b-instruct-v0.1"): (0.0, None),
        (content_hash(bone), "gpt-4-1106-preview"): (1.0, None),
        (content_hash(robe), "mixtral-8x7b-instruct-v0.1"): (1.0, None),
        (content_hash(robe), "gpt-4-1106-preview"): (1.0, None),
    }
    assert found.extras[content_hash(bone)] == {"category": "mmlu_anatomy"}
    assert found.extras[content_hash(robe)] == {"category": "gsm8k"}


def test_routellm_tells_models_from_other_columns_by_the_first_good_row(tmp_path: Path) -> None:
    text = "Unnamed: 0,prompt,m,domain\nragged\n0,one,True,law\n1,two,False,1\n"
    found = ingest("routellm", write(tmp_path / "r.csv", text), tmp_path / "out")
    assert found.outcomes == {(content_hash("one"), "m"): (1.0, None), (content_hash("two"), "m"): (0.0, None)}
    assert found.summary.ignored == {'column "Unnamed: 0"': 1, 'column "domain"': 1}
    assert [row[1] for row in found.quarantine] == [0]


# --- LLMRouter, LLMRouterBench, RouterArena ----------------------------------------------------------------------


def test_llmrouter(tmp_path: Path) -> None:
    found = ingest("llmrouter", FIXTURES / "llmrouter.jsonl", tmp_path)
    apples, bone, who = (
        "Janet has 4 apples and gives 2 away. How many are left?",
        "Which is a bone?\n\nA. ulna\nB. liver",
        "Who wrote it?",
    )
    assert found.prompts == ids([apples, bone, who])
    assert found.outcomes == {
        (content_hash(apples), "llama3-chatqa-1.5-8b"): (1.0, 4),
        (content_hash(bone), "qwen2.5-7b-instruct"): (1.0, 3),
        (content_hash(who), "qwen2.5-7b-instruct"): (0.5, 5),
    }
    assert found.extras[content_hash(bone)] == {"category": "mmlu"}
    assert (found.summary.ungraded, found.summary.ignored) == (1, {})  # the failed call


@pytest.mark.parametrize(
    ("choices", "metric", "tail"),
    [
        ('{"text": ["x", "y"], "label": ["1", "2"]}', "em_mc", "\n\n1. x\n2. y"),
        (["x", "y"], "em_mc", "\n\nA. x\nB. y"),
        ('["assert f(1) == 2"]', "code_eval", "\n\nassert f(1) == 2"),
        ("", "em_mc", ""),
    ],
)
def test_llmrouter_shows_the_choices_that_models_were_shown(
    tmp_path: Path, choices: object, metric: str, tail: str
) -> None:
    row = {"query": "which?", "choices": choices, "metric": metric, "model_name": "m", "performance": 1}
    found = ingest("llmrouter", write_jsonl(tmp_path / "l.jsonl", row), tmp_path / "out")
    assert list(found.prompts.values()) == ["which?" + tail]


def test_llmrouterbench_takes_the_newest_run(tmp_path: Path) -> None:
    found = ingest("llmrouterbench", FIXTURES / "llmrouterbench", tmp_path)
    two, three = "Question: What is 2+2?\nAnswer:", "Question: What is 3+3?\nAnswer:"
    assert found.prompts == ids([two, three])
    assert found.outcomes == {(content_hash(two), "glm-4.6"): (1.0, 5), (content_hash(two), "gpt-5"): (0.0, 9)}
    assert found.costs[content_hash(two), "gpt-5"] == 0.0001
    assert found.extras[content_hash(two)] == {"category": "aime"}
    assert (found.summary.ungraded, found.summary.repeated_pairs) == (1, 1)
    assert found.summary.ignored == {"demo run": 1}
    reason = 'target "glm-4.6" already has a grade for this prompt'
    assert found.quarantine == [("aime-test-glm-4.6-20250901_120000.json", 0, content_hash(two), reason)]


def test_llmrouterbench_before_it_wrote_the_model(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "aime" / "test" / "gpt-5" / "20251001_120000.json"
    path.parent.mkdir(parents=True)
    write(path, '{"performance": 1.0, "records": [{"index": 1, "prompt": "hi", "score": 1.0, "completion_tokens": 2}]}')
    found = ingest("llmrouterbench", tmp_path / "bench", tmp_path / "out")
    assert found.outcomes == {(content_hash("hi"), "gpt-5"): (1.0, 2)}
    assert found.extras == {content_hash("hi"): {"category": "aime"}}


def test_routerarena(tmp_path: Path) -> None:
    found = ingest("routerarena", FIXTURES / "routerarena.json", tmp_path)
    assert found.prompts == {
        "ArcMMLU_98": "Question: how many volumes?\n\nOptions: \nA. Three\nB. Four",
        "AIME_112": "Question: how many coins?",
        "AIME_58": "Question: which product?",
    }
    assert found.outcomes == {
        ("ArcMMLU_98", "gemini-2.0-flash-001"): (1.0, 66),
        ("ArcMMLU_98", "gpt-4o-mini"): (0.0, 12),
    }
    assert found.costs == dict.fromkeys(found.outcomes, 0.0001)
    assert found.extras["ArcMMLU_98"] == {"category": "ArcMMLU"}
    assert found.summary.ungraded == 2  # one not graded yet, one failed call


def test_routerarena_cached_results(tmp_path: Path) -> None:
    found = ingest("routerarena", FIXTURES / "routerarena.jsonl", tmp_path)
    assert found.prompts == {"AIME_112": "Question: how many coins?", "AIME_7": "Question: how far?"}
    assert found.outcomes == {("AIME_112", "gemini-2.0-flash-001"): (0.0, 686)}
    assert found.costs == {("AIME_112", "gemini-2.0-flash-001"): 0.0003}
    assert (found.summary.ungraded, found.summary.ignored) == (1, {})


# --- lm-evaluation-harness ---------------------------------------------------------------------------------------


def test_lm_eval(tmp_path: Path) -> None:
    found = ingest("lm-eval", FIXTURES / "lm_eval", tmp_path)
    assert found.prompts == {
        "gsm8k-0": "Question: how many eggs?\nAnswer:",
        "gsm8k-1": "Question: how many bolts?\nAnswer:",
        "copa-0": "It rained so",
    }
    assert found.outcomes == {
        ("gsm8k-0", "org/small"): (1.0, None),
        ("gsm8k-1", "org/small"): (0.0, None),
        ("gsm8k-0", "org__chat"): (0.0, None),  # the same document as a conversation
        ("copa-0", "org__chat"): (1.0, None),
    }
    assert found.extras["gsm8k-0"] == {"category": "gsm8k"}
    assert found.summary.other_wordings == 1
    assert found.summary.ignored == {'filter "flexible-extract" of gsm8k': 2}
    assert (found.summary.files, found.summary.files_ignored) == (3, 0)


def test_lm_eval_of_one_chat_model(tmp_path: Path) -> None:
    samples = FIXTURES / "lm_eval" / "org__chat" / "samples_gsm8k_2025-06-08T05-42-41.351110.jsonl"
    path = tmp_path / "samples_gsm8k.jsonl.gz"
    path.write_bytes(gzip.compress(samples.read_bytes()))
    found = ingest("lm-eval", path, tmp_path / "out", target="chat")
    assert found.prompts == {"gsm8k-0": [{"role": "user", "content": "Question: how many eggs?\nAnswer:"}]}
    assert found.outcomes == {("gsm8k-0", "chat"): (0.0, None)}


# --- ParetoBandit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_package", [False, True])
def test_paretobandit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_package: bool) -> None:
    folder = tmp_path / "some_bandit" / "data"
    folder.mkdir(parents=True)
    write(folder.parent / "__init__.py", "raise AssertionError('imported')")
    shutil.copy(FIXTURES / "paretobandit.jsonl", folder)
    monkeypatch.syspath_prepend(tmp_path)
    found = ingest("paretobandit", "package:some_bandit/data" if as_package else folder, tmp_path / "out")
    sisters, door = "How many sisters has Ann?", "Which is a door?\n  (A) a gate\n  (B) a lake"
    assert found.prompts == ids([sisters, door])
    small, large = "org/small-8b", "lab/large-2512"
    assert found.outcomes == {
        (content_hash(sisters), small): (pytest.approx(0.45), None),
        (content_hash(sisters), large): (1.0, None),
        (content_hash(door), large): (pytest.approx(0.93), None),
    }
    assert found.costs == {
        (content_hash(sisters), small): 3.8e-06,
        (content_hash(sisters), large): 0.0006155,
        (content_hash(door), large): 0.0,
    }
    assert found.extras[content_hash(sisters)] == {"category": "bbh", "source": "bbh/kinship"}
    assert found.extras[content_hash(door)] == {"category": "openbookqa", "source": "openbookqa"}
    assert (found.summary.ungraded, found.summary.quarantined, found.summary.ignored) == (1, 0, {})


def test_a_package_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="package:no_bandit/data: no Python package no_bandit is installed: install it"):
        ingest("paretobandit", "package:no_bandit/data", tmp_path / "out")


# --- OpenAI ------------------------------------------------------------------------------------------------------


def test_openai_log(tmp_path: Path) -> None:
    found = ingest("openai-log", FIXTURES / "openai.jsonl", tmp_path)
    river = {"role": "user", "content": "name a river"}
    prompts: list[Prompt] = [
        [{"role": "system", "content": "be brief"}, river],
        [{"role": "user", "content": "one\ntwo"}],
        [river, {"role": "assistant", "content": ""}],
        "name a lake",
    ]
    assert found.prompts == ids(prompts)
    assert [tuple(found.extras[content_hash(prompt)].values()) for prompt in prompts] == [
        ("gpt-4o-mini", None, None),
        ("gpt-4o", 12, None),
        ("gpt-4o-mini", None, "request-1"),
        ("gpt-4o-mini", 7, None),
    ]
    assert found.outcomes == {}
    assert not (tmp_path / "outcomes").exists()
    assert found.summary.repeated_prompts == 1
    assert found.summary.ignored == {'key "tool_calls" of messages': 1}
    image = '{"type": "image_url", "image_url": {"url": "data:"}}'
    assert [row[1:] for row in found.quarantine] == [
        (4, None, f"messages[1].content holds {image}, which is not text"),
        (5, None, "has neither prompt nor messages"),
    ]

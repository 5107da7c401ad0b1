from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefill_router.common.errors import UserError
from prefill_router.policy.pool import Pool, Target, load_pool
from tiny import POOL_TOML

PRICES = "input_price = 1.0\noutput_price = 2.0\n"


def write(folder: Path, text: str) -> str:
    path = folder / "pool.toml"
    path.write_text(text)
    return str(path)


def test_targets_keep_the_order_of_the_file(tmp_path: Path) -> None:
    pool = load_pool(write(tmp_path, POOL_TOML))
    assert pool.name == "pool"
    assert pool.target_names == ["big", "small"]
    assert pool.targets[1] == Target(name="small", input_price=0.1, output_price=0.4)


def test_a_pool_is_named_where_the_file_has_several(tmp_path: Path) -> None:
    uri = write(tmp_path, POOL_TOML + f'[[other]]\nname = "x"\n{PRICES}')
    assert load_pool(f"{uri}#other").target_names == ["x"]
    assert load_pool(f"{uri}#pool").target_names == ["big", "small"]
    with pytest.raises(UserError, match=r"has 2 pools \(pool, other\): select one with .*pool\.toml#NAME"):
        load_pool(uri)
    with pytest.raises(UserError, match='no pool "othr": select one of pool, other'):
        load_pool(f"{uri}#othr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[pool]]\nname = "x"\ninput_price = 1\noutput_price = -1',
            'target "x": output_price = -1, must be greater than or equal to 0',
        ),
        ('[[pool]]\nname = "x"\ninput_price = nan\noutput_price = 1', 'target "x": input_price = nan, must be '),
        (
            '[[pool]]\nname = "x"\ninput_price = inf\noutput_price = 1',
            'target "x": input_price = inf, must be a finite',
        ),
        (
            '[[pool]]\nname = "x"\ninput_price = "dear"\noutput_price = 1',
            "input_price = 'dear', must be a valid number",
        ),
        ('[[pool]]\nname = "x"\ninput_price = 1', 'target "x": output_price is missing'),
        (f"[[pool]]\n{PRICES}", r"pool\[0\]: name is missing"),
        (f"[[pool]]\nname = 3\n{PRICES}", "name = 3, must be a valid string"),
        (
            f'[[pool]]\nname = "x"\n{PRICES}currency = "EUR"',
            'unknown key "currency"; known: name, input_price, output_',
        ),
        (f'[[pool]]\nname = "x"\n{PRICES}input_prices = 2', 'unknown key "input_prices", did you mean "input_price"'),
        # A misspelt required key: the message names the misspelling, not the missing key.
        (
            '[[pool]]\nname = "x"\ninput_price = 1\nouput_price = 2',
            'unknown key "ouput_price", did you mean "output_price"',
        ),
        (f'[[pool]]\nname = "x"\n{PRICES}[[pool]]\nname = "x"\n{PRICES}', 'target "x" is repeated in pool "pool"'),
        (f'[pool]\nname = "x"\n{PRICES}', r"pool must be a list of targets, each \[\[pool\]\] with name and prices"),
        ("pool = []", "pool must be a list of targets"),
        ("pool = [1]", r"pool\[0\] = 1, must be a table with name, input_price and output_price"),
        ("", "has no pool"),
        ("[[pool", "not TOML"),
    ],
)
def test_an_error_names_the_file_the_key_the_value_and_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"pool\.toml: .*{message}"):
        load_pool(write(tmp_path, text))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("extra_body = { stream = true }", 'must not contain "stream", which belongs to the call'),
        ("extra_body = { max_tokens = 9 }", 'must not contain "max_tokens", which belongs to the call'),
        ('drop = ["messages"]', 'must not contain "messages", which belongs to the call'),
        ('drop = ["max_completion_tokens"]', 'must not contain "max_completion_tokens", which'),
        ('rename = { model = "m" }', 'must not contain "model", which belongs to the call'),
        ('rename = { user = "input" }', 'must not contain "input", which belongs to the call'),
        ('headers = { Authorization = "Bearer sk-1" }', 'must not contain "Authorization": credentials belong in'),
        ('headers = { "x-api-key" = "sk-1" }', 'must not contain "x-api-key": credentials belong in'),
        ('headers = { content-length = "7" }', 'must not contain "content-length"'),
        ('headers = { "x y" = "1" }', 'must contain valid header names and printable ASCII values, unlike "x y"'),
        ('headers = { x = "1\\r\\ny: 2" }', 'must contain valid header names and printable ASCII values, unlike "x"'),
    ],
)
def test_a_target_sets_neither_credentials_nor_what_belongs_to_a_call(
    tmp_path: Path, settings: str, message: str
) -> None:
    upstream = f'upstream = {{ base_url = "http://127.0.0.1/v1", {settings} }}'
    with pytest.raises(UserError, match=message):
        load_pool(write(tmp_path, f'[[pool]]\nname = "x"\n{PRICES}{upstream}'))


def test_two_targets_may_be_one_model_at_two_efforts(tmp_path: Path) -> None:
    target = '[[pool]]\nname = "m-{0}"\n' + PRICES
    target += (
        'upstream = {{ base_url = "http://127.0.0.1/v1", model = "m", extra_body = {{ reasoning_effort = "{0}" }} }}\n'
    )
    pool = load_pool(write(tmp_path, target.format("low") + target.format("high")))
    upstreams = [target.upstream for target in pool.targets if target.upstream is not None]
    assert pool.target_names == ["m-low", "m-high"]
    assert [upstream.extra_body for upstream in upstreams] == [{"reasoning_effort": e} for e in ("low", "high")]
    assert Pool.model_validate_json(pool.model_dump_json()) == pool


def test_an_error_reads_as_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name = '', must have at least 1 character$"):
        load_pool(write(tmp_path, f'[[pool]]\nname = ""\n{PRICES}'))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: no such file"):
        load_pool(str(tmp_path / "nowhere.toml#pool"))


def test_expected_cost_is_the_formula_in_usd_per_million_tokens() -> None:
    pool = Pool(
        name="pool",
        targets=(
            Target(name="a", input_price=2.0, output_price=8.0),
            Target(name="b", input_price=0.0, output_price=0.4),
        ),
    )
    cost = pool.expected_cost(np.array([1000, 0], np.int32), np.array([[500, 1000], [0, 10]], np.float32))
    assert cost.dtype == np.float64
    np.testing.assert_allclose(cost, [[(1000 * 2 + 500 * 8) / 1e6, 400 / 1e6], [0, 4 / 1e6]], rtol=1e-12)


# --- keys of upstreams -----------------------------------------------------------------------------------------------


def upstream(**fields: object) -> str:
    way = {"base_url": "https://api.example.com/v1", **fields}
    values = ", ".join(f"{key} = {str(value).lower() if value is True else repr(value)}" for key, value in way.items())
    return f'[[pool]]\nname = "x"\n{PRICES}upstream = {{ {values} }}'


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "OPENAI_API_KEY_2", "DEEPSEEK_APIKEY", "AZURE_OPENAI_API_KEY", "HF_TOKEN", "small_key"]
)
def test_a_key_of_a_providers_is_taken(tmp_path: Path, name: str) -> None:
    load_pool(write(tmp_path, upstream(key_env=name)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AWS_SECRET_ACCESS_KEY", r"must not be one of the AWS_\* variables"),
        ("aws_session_token", r"must not be one of the AWS_\* variables"),
        ("RAY_AUTH_TOKEN", r"must not be one of the RAY_\* variables"),
        ("GITHUB_TOKEN", r"must not be one of the GITHUB_\* variables"),
        ("CI_JOB_TOKEN", r"must not be one of the CI_\* variables"),
        ("AZURE_STORAGE_KEY", r"must not be one of the AZURE_STORAGE_\* variables"),
        ("PATH", "must have KEY or TOKEN as a word"),
        ("HOME", "must have KEY or TOKEN as a word"),
        ("DATABASE_URL", "must have KEY or TOKEN as a word"),
        ("TOKENIZERS_PARALLELISM", "must have KEY or TOKEN as a word"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "must have KEY or TOKEN as a word"),
        ("", "must have KEY or TOKEN as a word"),
        ("MY KEY", "must have KEY or TOKEN as a word"),
    ],
)
def test_a_variable_of_others_is_not_sent_to_an_upstream(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"target \"x\": upstream.key_env = '{name}', {reason}"):
        load_pool(write(tmp_path, upstream(key_env=name)))


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000"])
def test_a_key_may_go_over_loopback(tmp_path: Path, host: str) -> None:
    load_pool(write(tmp_path, upstream(base_url=f"http://{host}/v1", key_env="SMALL_KEY")))


@pytest.mark.parametrize("host", ["gpu-1:8000", "10.0.0.1", "localhost.example.com", "127.0.0.1.nip.io"])
def test_a_key_does_not_go_over_a_network_in_the_clear(tmp_path: Path, host: str) -> None:
    url = f"http://{host}/v1"
    reason = f"must not be sent to {host.partition(':')[0]} over plain http: use https in base_url, or set allow_http"
    with pytest.raises(UserError, match=reason):
        load_pool(write(tmp_path, upstream(base_url=url, key_env="SMALL_KEY")))
    load_pool(write(tmp_path, upstream(base_url=url)))
    load_pool(write(tmp_path, upstream(base_url=url, key_env="SMALL_KEY", allow_http=True)))


@pytest.mark.parametrize(
    "url", ["https://me:secret@example.com/v1", "https://example.com/v1?api-key=secret", "ftp://x"]
)
def test_a_key_does_not_stand_in_the_url(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=r"upstream\.base_url = "):
        load_pool(write(tmp_path, upstream(base_url=url)))


TIERED = Target.model_validate(
    {
        "name": "tiered",
        "input_price": 1.0,
        "output_price": 10.0,
        "cached_input_price": 0.1,
        "cache_write_price": 1.25,
        "tiers": [
            {"above": 100, "input_price": 2, "output_price": 15, "cached_input_price": 0.2, "cache_write_price": 2.5},
            {"above": 200, "input_price": 4, "output_price": 15, "cached_input_price": 0.4, "cache_write_price": 5},
        ],
    }
)


def test_a_token_of_the_cache_costs_what_it_costs_there() -> None:
    target = TIERED.model_copy(update={"cache_write_long_price": 2.0, "tiers": ()})
    usd = 1.0 * (100 - 30 - 20) + 0.1 * 30 + 1.25 * 15 + 2.0 * 5 + 10.0 * 7
    assert target.cost(100, 7, 30, 20, 5) == pytest.approx(usd / 1e6, rel=1e-12)
    plain = Target(name="plain", input_price=3.0, output_price=1.0)
    assert plain.cost(100, 0, 30, 20, 5) == pytest.approx(300e-6, rel=1e-12)  # prices that are not stated
    assert TIERED.cost(100, 0, 0, 20, 5) == pytest.approx((80 + 1.25 * 20) / 1e6, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "usd"), [(100, 100 + 70), (101, 202 + 105), (200, 400 + 105), (201, 804 + 105), (10**6, 4e6 + 105)]
)
def test_a_long_input_raises_the_price_of_every_token(tokens: int, usd: float) -> None:
    assert TIERED.cost(tokens, 7) == pytest.approx(usd / 1e6, rel=1e-12)
    pool = Pool(name="p", targets=(Target(name="plain", input_price=3.0, output_price=1.0), TIERED))
    costs = pool.expected_cost(np.array([tokens, 50]), np.full((2, 2), 7.0))
    np.testing.assert_allclose(costs, np.array([[3 * tokens + 7, usd], [157, 120]]) / 1e6, rtol=1e-12)


def test_a_prompt_of_300_000_tokens_is_above_a_tier_of_272_000() -> None:
    tier = {"above": 272_000, "input_price": 5.0, "output_price": 22.5, "cached_input_price": 0.5}
    prices = {"input_price": 2.5, "output_price": 15.0, "cached_input_price": 0.25, "tiers": [tier]}
    target = Target.model_validate({"name": "long", **prices})
    assert target.cost(300_000, 1000, 100_000) == pytest.approx(1.0 + 0.05 + 0.0225, rel=1e-12)
    assert target.cost(272_000, 1000) == pytest.approx(0.68 + 0.015, rel=1e-12)


def test_nothing_costs_more_than_the_most() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        written_1h, written, cached, full, made = rng.integers(0, 100, 5).tolist()
        usage = (full + cached + written_1h + written, made, cached, written + written_1h, written_1h)
        assert TIERED.cost(*usage) <= TIERED.most_cost(usage[0] + 5, made) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[pool]]\nname = "x"\nusd_per_answer = 1\ntiers = [{ above = 5, input_price = 1, output_price = 1 }]',
            "input",
        ),
        (
            f'[[pool]]\nname = "x"\n{PRICES}tiers = [{{ above = 5, input_price = 1 }}]',
            "tiers.0.output_price is missing",
        ),
        (
            f'[[pool]]\nname = "x"\n{PRICES}cached_input_price = 0.1\n'
            "tiers = [{ above = 5, input_price = 1, output_price = 1 }]",
            "tiers: cached_input_price is missing above 5",
        ),
        (
            f'[[pool]]\nname = "x"\n{PRICES}tiers = [{{ above = 5, input_price = 1, output_price = 1 }}, '
            "{ above = 5, input_price = 2, output_price = 1 }]",
            "tiers: above = 5, must be more than in the tier before, 5",
        ),
    ],
)
def test_tiers_state_all_prices_and_ascend(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pool(write(tmp_path, text))


def test_tiers_are_part_of_what_an_artifact_keeps() -> None:
    assert Target.model_validate(TIERED.model_dump()) == TIERED
    assert "tiers" not in Target(name="plain", input_price=3.0, output_price=1.0).model_dump()
    assert (
        Pool(name="p", targets=(TIERED,)).prices
        != Pool(name="p", targets=(TIERED.model_copy(update={"tiers": TIERED.tiers[:1]}),)).prices
    )

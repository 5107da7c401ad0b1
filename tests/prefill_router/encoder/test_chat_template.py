"""Chat templates that never end, or make gigabytes: their process is ended, and the next prompt is rendered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefill_router.common.errors import UserError
from prefill_router.encoder import model_files, prefill_encoder
from prefill_router.encoder.chat_template import ChatTemplate, TemplateError, of_tokenizer
from prefill_router.encoder.prefill_encoder import EncoderSpec, PrefillEncoder
from tiny import save_tiny_model

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ASKED = [{"role": "user", "content": "What is 17 * 23?"}]


@contextmanager
def template(source: str, wall_s: float = 20.0) -> Iterator[ChatTemplate]:
    made = ChatTemplate(source, {"eos_token": "</s>"}, wall_s)
    try:
        yield made
    finally:
        made.close()


def test_a_prompt_that_makes_a_template_loop_is_refused_and_the_next_is_rendered() -> None:
    with template(
        "{% if messages[0].content == 'x' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}", 1.0
    ) as made:
        made.render([{"role": "user", "content": "y"}])
        with pytest.raises(TemplateError, match="rendering took more than 1 s"):
            made.render([{"role": "user", "content": "x"}])
        assert made.render(ASKED) == "What is 17 * 23?"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}", "makes 100,000,000 characters, must make at most"),
        ("{{ 'x' * 10 ** 11 }}", "takes more memory than it may"),
        ("{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "memory"),
        ("{{ ('x' * messages[0].content|length * 10 ** 10)|length }}", "memory"),
    ],
)
def test_what_a_template_makes_is_bounded(monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    monkeypatch.setattr("prefill_router.encoder.chat_template.MEMORY_BYTES", 600 << 20)
    with template(source) as made, pytest.raises(TemplateError, match=reason) as caught:
        made.render(ASKED)
    assert caught.value.is_endless


def test_after_too_many_prompts_it_is_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_router.encoder.chat_template._MOST_DEATHS", 1)
    with template(ENDLESS, 0.2) as made:
        with pytest.raises(TemplateError, match="took more than"):
            made.render(ASKED)
        with pytest.raises(TemplateError, match=r"1 prompts took more than 0.2 s, or ended"):
            made.render(ASKED)


def test_an_encoder_whose_template_makes_no_end_of_text_is_not_loaded(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, chat_template="{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}")
    for load in (lambda: PrefillEncoder.load(str(model)), lambda: prefill_encoder.check(EncoderSpec(model=str(model)))):
        with pytest.raises(UserError, match=r"its chat template is not fit for use: rendering makes 100,000,000"):
            load()


def test_what_is_rendered_is_what_transformers_renders(tiny_encoder: PrefillEncoder) -> None:
    tokenizer = tiny_encoder.tokenizer
    asked = [*ASKED, {"role": "assistant", "content": "391 <|im_end|>"}, {"role": "user", "content": "  ü "}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert of_tokenizer(tokenizer).render(asked) == tiny_encoder.render(asked) == text
    model_files.check_template(tokenizer)

"""Chat templates that loop forever or produce gigabytes are stopped, and the next prompt is rendered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefill_router.common.errors import UserError
from prefill_router.encoder import model_files
from prefill_router.encoder.chat_template import ChatTemplate, TemplateError, template_of
from prefill_router.encoder.encoder_spec import EncoderSpec, check_encoder
from prefill_router.encoder.prefill_encoder import PrefillEncoder
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


def test_a_prompt_that_makes_a_template_loop_is_rejected_and_the_next_is_rendered() -> None:
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
        ("{{ 'x' * 10 ** 11 }}", "exceeds the memory limit"),
        ("{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "memory"),
        ("{{ ('x' * messages[0].content|length * 10 ** 10)|length }}", "memory"),
    ],
)
def test_the_output_of_a_template_is_limited(monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    monkeypatch.setattr("prefill_router.encoder.chat_template.MEMORY_BYTES", 600 << 20)
    with template(source) as made, pytest.raises(TemplateError, match=reason) as caught:
        made.render(ASKED)
    assert caught.value.exceeds_limits


def test_a_template_that_fails_too_often_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefill_router.encoder.chat_template._MAX_DEATHS", 1)
    with template(ENDLESS, 0.2) as made:
        with pytest.raises(TemplateError, match="took more than"):
            made.render(ASKED)
        with pytest.raises(TemplateError, match=r"rendering 1 prompts took more than 0.2 s each or crashed"):
            made.render(ASKED)


def test_an_encoder_whose_template_exceeds_its_limits_is_not_loaded(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, chat_template="{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}")
    for load in (lambda: PrefillEncoder.load(str(model)), lambda: check_encoder(EncoderSpec(model=str(model)))):
        with pytest.raises(UserError, match=r"its chat template is unusable: rendering makes 100,000,000"):
            load()


def test_rendered_text_equals_transformers(tiny_encoder: PrefillEncoder) -> None:
    tokenizer = tiny_encoder.tokenizer
    asked = [*ASKED, {"role": "assistant", "content": "391 <|im_end|>"}, {"role": "user", "content": "  ü "}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert template_of(tokenizer).render(asked) == tiny_encoder.render(asked) == text
    model_files.check_template(tokenizer)

"""Renders chat templates in a child process, because a template is an untrusted program that comes with a model.

A template may loop forever or expand a short prompt to gigabytes. The child has limits on time and memory, and the
rendered text has a limit on its length.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefill_router.common.child_process import Child, ChildDied

WALL_S = 10.0  # time limit per prompt
MEMORY_BYTES = 2 << 30
_MAX_DEATHS = 8  # after which the template is at fault, not the prompts
_EXTRA_CHARS = 1 << 20  # that a template may add to a conversation
_MAX_COPIES = 16  # of a conversation's text

Messages = Sequence[dict[str, Any]] | Sequence[dict[str, str]]


class TemplateError(Exception):
    """A template failed to render messages. `line` is the line of a syntax error.

    `exceeds_limits` is set if rendering exceeded the limits on time, memory or text length.
    """

    def __init__(self, message: str, line: int | None = None, exceeds_limits: bool = False) -> None:
        super().__init__(message, line, exceeds_limits)
        self.message, self.line, self.exceeds_limits = message, line, exceeds_limits

    def __str__(self) -> str:
        return self.message


class ChatTemplate:
    """Renders messages as transformers does. Threads may share it; prompts are rendered one at a time."""

    def __init__(self, source: str, variables: Mapping[str, Any], wall_s: float = WALL_S) -> None:
        """`variables` are the template's variables besides the messages, such as the special tokens."""
        self.wall_s = wall_s
        self._child = Child(_make_renderer, (source, dict(variables)), MEMORY_BYTES)
        self._num_deaths = 0

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """Returns the rendered text. Raises TemplateError."""
        if self._num_deaths >= _MAX_DEATHS:
            reason = f"rendering {_MAX_DEATHS} prompts took more than {self.wall_s:g} s each or crashed"
            raise TemplateError(reason, exceeds_limits=True)
        try:
            text: str = self._child.ask((list(messages), add_generation_prompt), self.wall_s)
        except ChildDied as death:
            self._num_deaths += 1
            raise TemplateError(f"rendering {death}", exceeds_limits=True) from None
        return text

    def close(self) -> None:
        self._child.close()


@functools.lru_cache(maxsize=4)
def _shared(source: str, variables: str) -> ChatTemplate:
    return ChatTemplate(source, json.loads(variables))


def template_of(tokenizer: Any, before: str = "", arguments: Mapping[str, Any] | None = None) -> ChatTemplate:
    """Returns a tokenizer's chat template with `before` prepended. Equal templates share a child process."""
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return _shared(before + tokenizer.get_chat_template(), json.dumps({**tokens, **(arguments or {})}, sort_keys=True))


def _make_renderer(setup: tuple[str, dict[str, Any]]) -> Callable[[tuple[list[dict[str, Any]], bool]], str]:
    """Runs in the child: returns a function that renders one conversation, with bounded text and error messages."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    source, variables = setup

    def render(request: tuple[list[dict[str, Any]], bool]) -> str:
        messages, add_generation_prompt = request
        options: dict[str, Any] = {
            **variables,
            "chat_template": source,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            texts: Any = render_jinja_template(conversations=[messages], **options)
            text = str(texts[0][0])
        except MemoryError:
            raise TemplateError("rendering exceeds the memory limit", exceeds_limits=True) from None
        except TemplateSyntaxError as error:
            raise TemplateError(str(error)[:1000], error.lineno) from None
        except Exception as error:  # a template can raise any exception
            raise TemplateError((str(error) or type(error).__name__)[:1000]) from None
        most = _EXTRA_CHARS + _MAX_COPIES * sum(len(str(message.get("content"))) for message in messages)
        if len(text) > most:
            reason = f"rendering makes {len(text):,} characters, must make at most {most:,}"
            raise TemplateError(reason, exceeds_limits=True)
        return text

    return render

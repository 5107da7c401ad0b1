"""Chat templates, rendered in a process of their own: they are programs, which come with a model that others made.

A template may loop without end, or make gigabytes of a short prompt, when it is compiled or for some prompt. Its
process has limits of time and memory, and what it renders one of length.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefill_router.common.child_process import Child, ChildDied

WALL_S = 10.0  # for one prompt
MEMORY_BYTES = 2 << 30
_MOST_DEATHS = 8  # then it is the template, not the prompts
_FIXED_CHARS = 1 << 20  # that a template may add to a conversation
_MOST_COPIES = 16  # of a conversation's text

Messages = Sequence[dict[str, Any]] | Sequence[dict[str, str]]


class TemplateError(Exception):
    """Why a template renders no messages; `line` is where it is broken, if it is.

    `is_endless` says that it takes more time, memory or text than any template should.
    """

    def __init__(self, message: str, line: int | None = None, is_endless: bool = False) -> None:
        super().__init__(message, line, is_endless)
        self.message, self.line, self.is_endless = message, line, is_endless

    def __str__(self) -> str:
        return self.message


class ChatTemplate:
    """Renders messages as transformers does. Threads take turns."""

    def __init__(self, source: str, variables: Mapping[str, Any], wall_s: float = WALL_S) -> None:
        """`variables` are what the template may name beside the messages, such as the special tokens."""
        self.wall_s = wall_s
        self._child = Child(_rendering, (source, dict(variables)), MEMORY_BYTES)
        self._num_deaths = 0

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """Raises TemplateError."""
        if self._num_deaths >= _MOST_DEATHS:
            raise TemplateError(
                f"{_MOST_DEATHS} prompts took more than {self.wall_s:g} s, or ended its process", is_endless=True
            )
        try:
            text: str = self._child.ask((list(messages), add_generation_prompt), self.wall_s)
        except ChildDied as death:
            self._num_deaths += 1
            raise TemplateError(f"rendering {death}", is_endless=True) from None
        return text

    def close(self) -> None:
        self._child.close()


@functools.lru_cache(maxsize=4)
def _shared(source: str, variables: str) -> ChatTemplate:
    return ChatTemplate(source, json.loads(variables))


def of_tokenizer(tokenizer: Any, before: str = "", arguments: Mapping[str, Any] | None = None) -> ChatTemplate:
    """The template of a tokenizer that has one, with `before` put before its source. Equal ones share a process."""
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return _shared(before + tokenizer.get_chat_template(), json.dumps({**tokens, **(arguments or {})}, sort_keys=True))


def _rendering(about: tuple[str, dict[str, Any]]) -> Callable[[tuple[list[dict[str, Any]], bool]], str]:
    """In the process: renders one conversation. What is sent back is bounded, and so are reasons."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    source, variables = about

    def rendered(asked: tuple[list[dict[str, Any]], bool]) -> str:
        messages, add_generation_prompt = asked
        options: dict[str, Any] = {
            **variables,
            "chat_template": source,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            texts: Any = render_jinja_template(conversations=[messages], **options)
            text = str(texts[0][0])
        except MemoryError:
            raise TemplateError("rendering takes more memory than it may", is_endless=True) from None
        except TemplateSyntaxError as error:
            raise TemplateError(str(error)[:1000], error.lineno) from None
        except Exception as error:  # templates raise what they like
            raise TemplateError((str(error) or type(error).__name__)[:1000]) from None
        most = _FIXED_CHARS + _MOST_COPIES * sum(len(str(message.get("content"))) for message in messages)
        if len(text) > most:
            raise TemplateError(
                f"rendering makes {len(text):,} characters, must make at most {most:,}", is_endless=True
            )
        return text

    return rendered

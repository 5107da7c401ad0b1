"""Converts prompts to token ids with the model's own chat template and tokenizer.

Rendering is deterministic: templates that ask for today's date get a fixed one. Prompt text cannot inject control
tokens: text that looks like a special token is tokenised as plain text.
"""

# N prompts

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefill_router.common.errors import UserError, one_line
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder.chat_template import ChatTemplate, TemplateError, template_of

_PROBE = "Zebra 4815162342"
_DATE_OF_TODAY = "strftime_now"
_DATE_CODES = [f"%{letter}" for letter in ("-d", "-m", "-H", "-I", "-M", "-S", *"aAbBcdefGHIjmMpSuUVwWxXyYzZDFTR")]
_RESERVED = (
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "tokenizer_kwargs", "return_tensors", "return_dict", _DATE_OF_TODAY),
)


@dataclass(frozen=True)
class Tokens:
    """Token ids of prompts after truncation, and their lengths before it."""

    ids: list[list[int]]
    full_lengths: NDArray[np.int32]  # (N,) tokens before truncation

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """The prompts of all parts, in order."""
        return cls([ids for part in parts for ids in part.ids], np.concatenate([part.full_lengths for part in parts]))

    @property
    def num_tokens(self) -> NDArray[np.int32]:
        return np.array([len(ids) for ids in self.ids], np.int32)

    @property
    def is_truncated(self) -> NDArray[np.bool_]:
        """(N,) whether each prompt's middle was cut."""
        return self.num_tokens < self.full_lengths

    @property
    def num_truncated(self) -> int:
        return int(self.is_truncated.sum())


class PromptTokenizer:
    """Renders and tokenises prompts for one model. Threads may share it.

    `arguments` are passed to the chat template, such as `enable_thinking`. `today` is the date that templates see.
    Raises UserError for a reserved argument, and for a template whose output does not contain the prompt.
    """

    def __init__(self, tokenizer: Any, model: str, max_tokens: int, today: date, arguments: Mapping[str, Any]) -> None:
        self.tokenizer, self.model, self.max_tokens = tokenizer, model, max_tokens
        for name in arguments:
            if name in _RESERVED:
                raise UserError(f"template argument {name} is reserved: remove it")
        self._settings, before = dict(arguments), ""
        if _DATE_OF_TODAY in (tokenizer.chat_template or ""):
            self._settings["date"], before = today.isoformat(), _fixed_date_macro(today)
        has_template = tokenizer.chat_template is not None
        self._template = template_of(tokenizer, before, arguments) if has_template else None
        self._wants_parts = self._template is not None and self._find_parts(self._template)
        control = sorted(_control_tokens(tokenizer), key=len, reverse=True)
        # Alternatives are tried in order: longest first. Without control tokens, the pattern matches nothing.
        self._control = re.compile("|".join(map(re.escape, control)) or "(?!)")
        self._control_ids = set(tokenizer.convert_tokens_to_ids(control)) - {tokenizer.unk_token_id}
        self._lock = threading.Lock()  # fast tokenizers are not thread-safe

    @property
    def digest(self) -> dict[str, Any]:
        """Everything that determines a prompt's tokens, for the fingerprint."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = _saved(self.tokenizer) if backend is None else backend.to_str().encode()
        parts = {"tokenizer": hashlib.sha256(content).hexdigest(), "chat_template": self.tokenizer.chat_template}
        return {**parts, **({"template_arguments": self._settings} if self._settings else {})}

    def render(self, prompt: Prompt) -> str:
        """Renders a prompt with the model's chat template, ending in the generation prompt.

        A bare prompt becomes one user message. Without a chat template, a bare prompt is returned unchanged, and a
        conversation becomes paragraphs such as `User: ...`, ending with `Assistant:`. Raises UserError if the template
        rejects the messages.
        """
        if self._template is None:
            return prompt if isinstance(prompt, str) else _plain(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return self._template.render(self._adapted(messages, self._wants_parts))
        except TemplateError as error:
            raise UserError(f"the chat template of {self.model} refuses the messages: {one_line(error)}") from None

    def tokenize(self, prompts: Sequence[Prompt]) -> Tokens:
        """Returns each prompt's token ids, with special tokens from the chat template, or else from the tokenizer.

        The middle of a prompt longer than `max_tokens` is cut, which keeps the template's opening and the generation
        prompt. Raises UserError for a prompt without tokens.
        """
        if isinstance(prompts, str):
            raise UserError("prompts must be a list of prompts, not one string")
        if not prompts:
            return Tokens([], np.zeros(0, np.int32))
        has_control = [any(map(self._control.search, _texts(prompt))) for prompt in prompts]
        plain = iter(self._ids([self.render(p) for p, has in zip(prompts, has_control, strict=True) if not has]))
        ids = [
            self._ids_with_control_text(prompt) if has else next(plain)
            for prompt, has in zip(prompts, has_control, strict=True)
        ]
        if not all(ids):
            raise UserError("a prompt has no tokens: it is empty, and the model has no chat template")
        lengths = np.array([len(i) for i in ids], np.int32)
        return Tokens([_cut_middle(i, self.max_tokens) for i in ids], lengths)

    def _ids(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": self._template is None, **options}
        with self._lock:
            ids: list[list[int]] = self.tokenizer(list(texts), verbose=False, **options)["input_ids"]
        return ids

    def _ids_with_control_text(self, prompt: Prompt) -> list[int]:
        """Tokenises a prompt whose text contains control tokens: only those from the template keep their meaning.

        Replaces the ones in the text by random markers, renders the prompt, and restores them as plain text.
        """
        if self._template is None:
            before, after = self._added_by_tokenizer()
            return [*before, *self._ids_of_text(self.render(prompt)), *after]
        mark = f"\ue000{secrets.token_hex(8)}"
        hidden: list[str] = []

        def hide(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return f"{mark}{len(hidden) - 1}\ue001"

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        texts = [self._control.sub(hide, text) for text in _texts(prompt)]
        rendered = self.render([{**message, "content": text} for message, text in zip(messages, texts, strict=True)])
        ids: list[int] = []
        end = 0
        for control in (*self._control.finditer(rendered), None):
            text = rendered[end : control.start() if control else None]
            ids += self._ids_of_text(re.sub(f"{mark}(\\d+)\ue001", lambda found: hidden[int(found[1])], text))
            if control:
                ids.append(self.tokenizer.convert_tokens_to_ids(control[0]))
                end = control.end()
        return ids

    def _ids_of_text(self, text: str) -> list[int]:
        """Tokenises a text without producing control tokens, whatever the text contains."""
        ids = self._ids([text], add_special_tokens=False, split_special_tokens=True)[0]
        if self._control_ids.isdisjoint(ids):
            return ids
        # Some vocabularies also have control tokens as ordinary words: split each after its first character.
        cuts = [0, *(found.start() + 1 for found in self._control.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        return [i for ids in self._ids(parts, add_special_tokens=False, split_special_tokens=True) for i in ids]

    def _added_by_tokenizer(self) -> tuple[list[int], list[int]]:
        """Returns the special tokens that a tokenizer without a template adds before and after a text."""
        [whole], [bare] = self._ids([_PROBE]), self._ids([_PROBE], add_special_tokens=False)
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def _adapted(self, messages: Sequence[Mapping[str, Any]], wants_parts: bool) -> list[dict[str, Any]]:
        """Converts messages to the roles and content format that the template supports."""
        adapted = [dict(message) for message in messages]
        for message in adapted:
            if message["role"] == "developer" and "developer" not in self.tokenizer.chat_template:
                message["role"] = "system"
            if wants_parts and isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        return adapted

    def _find_parts(self, template: ChatTemplate) -> bool:
        """Whether the template needs a message's content as a list of parts.

        Raises UserError if its output contains the content in neither form.
        """
        failed = False
        for wants_parts in (False, True):
            try:
                if _PROBE in template.render(self._adapted([{"role": "user", "content": _PROBE}], wants_parts)):
                    return wants_parts
            except TemplateError:
                failed = True  # the template may still accept other messages
        if failed:
            return False
        raise UserError(f"the chat template of {self.model} omits the prompt's text: choose another model")


def _fixed_date_macro(today: date) -> str:
    """Returns a Jinja macro that replaces transformers' function of the same name, which formats the current time."""
    midnight = datetime.combine(today, time())
    formats = "".join(
        f"|replace({json.dumps(code)}, {json.dumps(midnight.strftime(code))})" for code in (*_DATE_CODES, "%%")
    )
    # The empty output keeps Jinja from dropping a newline at the start of the template.
    return f"{{% macro {_DATE_OF_TODAY}(format) %}}{{{{ format{formats} }}}}{{% endmacro %}}{{{{ '' }}}}"


def _control_tokens(tokenizer: Any) -> set[str]:
    """Returns the tokens that prompt text cannot inject: special ones, and added ones that the chat template writes."""
    template = tokenizer.chat_template or ""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    written = {token.content for token in added if token.special or token.content in template}
    return {token for token in written | set(tokenizer.all_special_tokens) if token.strip()}


def _texts(prompt: Prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [str(message["content"]) for message in prompt]


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def _saved(tokenizer: Any) -> bytes:
    """Returns the file hashes of a tokenizer that the tokenizers library cannot serialise."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}
    return json.dumps(files, sort_keys=True).encode()


def _cut_middle(ids: list[int], max_tokens: int) -> list[int]:
    if len(ids) <= max_tokens:
        return ids
    tail = max_tokens // 2
    return ids[: max_tokens - tail] + ids[len(ids) - tail :]

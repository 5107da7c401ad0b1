"""Detects repeated prompts and repeated grades while a source is read."""

from __future__ import annotations

from enum import Enum, auto

from prefill_router.corpus.reader import id_digest

_HALF = (1 << 64) - 1


class Recurrence(Enum):
    """The relation of a prompt to earlier ones."""

    NEW = auto()
    AGAIN = auto()
    OTHER_WORDING = auto()  # same id and identity, different text
    CLASH = auto()  # same id, different prompt


class Seen:
    """The prompts read so far, and the targets graded on each."""

    def __init__(self) -> None:
        # One integer per prompt: 64 bits of the content, 64 bits of the identity, one bit per target.
        self._prompts: dict[bytes, int] = {}
        self._bits: dict[str, int] = {}

    def place(self, prompt_id: str, content: bytes, identity: str | None) -> Recurrence:
        key = id_digest(prompt_id)
        known = content[:8] if identity is None else id_digest(identity)
        marks = int.from_bytes(content[:8] + known, "little")
        before = self._prompts.get(key)
        if before is None:
            self._prompts[key] = marks
            return Recurrence.NEW
        differs = before ^ marks
        if not differs & _HALF:
            return Recurrence.AGAIN
        return Recurrence.CLASH if differs >> 64 & _HALF else Recurrence.OTHER_WORDING

    def grade(self, prompt_id: str, target: str) -> bool:
        """Records a pair, and returns whether it is new. `place` must have recorded the prompt."""
        bit = 1 << (128 + self._bits.setdefault(target, len(self._bits)))
        key = id_digest(prompt_id)
        before = self._prompts[key]
        self._prompts[key] = before | bit
        return not before & bit

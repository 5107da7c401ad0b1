"""What is kept of every prompt while a source is read: how it differs from the others, and who was graded on it."""

from __future__ import annotations

from enum import Enum, auto

from prefill_router.corpus.reader import id_digest

_HALF = (1 << 64) - 1


class Recurrence(Enum):
    """How a prompt stands to those before it."""

    NEW = auto()
    AGAIN = auto()
    OTHER_WORDING = auto()  # the prompt that has its id is known to be the same, but reads otherwise
    CLASH = auto()  # another prompt has its id


class Seen:
    """The prompts so far, and the targets that each was graded on."""

    def __init__(self) -> None:
        # An integer each: 64 bits of the content, 64 bits of the identity, a bit for each target.
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
        """Notes a pair, and says whether it is new. The prompt must have been placed."""
        bit = 1 << (128 + self._bits.setdefault(target, len(self._bits)))
        key = id_digest(prompt_id)
        before = self._prompts[key]
        self._prompts[key] = before | bit
        return not before & bit

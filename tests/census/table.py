"""CENSUS.md: what came of each kind when it was last written, in a form to read and to compare with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("CENSUS.md")

_HEAD = """# Which language models the encoder reads

One tiny random checkpoint of each kind in transformers {version}, loaded with `PrefillEncoder.load` and compared with
transformers' own `output_hidden_states=True` of each prompt alone, all layers and poolings. `python
tests/census/census.py` writes this table, and the tests beside it fail where an outcome differs from it.

- `exact`: right within float16's rounding, for prompts alone, in company, with a shared prefix and cut at a depth; by
  `PackedBackbone` (packed) or `HookedBackbone` (general)
- `refused`: `PrefillEncoder.load` says that it does not read such a model, or not in bfloat16, and why
- `wrong`: it differs from transformers, and where
- `traceback`: an exception that is no line for a user
- `not built`: transformers makes no such checkpoint, or runs it on no text

float32: the worst relative error of a vector. bfloat16: the mean relative error to float32, at most {loose} times that
of transformers in bfloat16. company: the mean relative error, in bfloat16, of prompts in company to each alone; 0 where
their bits are the same. All are rounded up to a power of ten.
"""
_COLUMNS = "| kind | class | outcome | float32 | bfloat16 | company |\n| --- | --- | --- | --- | --- | --- |"


@dataclass(frozen=True)
class Row:
    """What came of one kind: `outcome` is what the tests compare."""

    kind: str
    class_name: str
    outcome: str
    float32: float = math.nan
    bfloat16: float = math.nan
    company: float = math.nan

    def __str__(self) -> str:
        numbers = (_power_of_ten(error) for error in (self.float32, self.bfloat16, self.company))
        return f"| {' | '.join([self.kind, self.class_name, self.outcome, *numbers])} |"


def read(section: str = "") -> dict[str, str]:
    """The outcome of each kind in the table, or in one of its sections."""
    _head, *sections = PATH.read_text().split("\n## ")
    text = "\n".join(each for each in sections if each.startswith(section))
    cells = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[1].strip(): row[3].strip() for row in cells if row[1].strip() not in ("kind", "---")}


def write(sections: Mapping[str, Sequence[Row]], loose: float) -> None:
    """Writes the table anew, a section for each list of rows."""
    from transformers import __version__

    rows = [row for section in sections.values() for row in section]
    counts = Counter(row.outcome.partition(":")[0] for row in rows)
    parts = [
        _HEAD.format(version=__version__, loose=f"{loose:g}"),
        "\n".join(
            ["| outcome | kinds |", "| --- | --- |", *(f"| {name} | {n} |" for name, n in sorted(counts.items()))]
        ),
        *(f"\n## {title}\n\n{_COLUMNS}\n" + "\n".join(map(str, section)) for title, section in sections.items()),
    ]
    PATH.write_text("\n".join(parts) + "\n")


def _power_of_ten(error: float) -> str:
    """Rounded up, so that it is the same on other machines."""
    if math.isnan(error):
        return ""
    return "0" if error == 0 else f"1e{math.ceil(math.log10(error))}" if math.isfinite(error) else str(error)

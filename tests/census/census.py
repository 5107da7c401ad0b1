"""How the encoder reads each kind of language model in transformers: a tiny random checkpoint, against transformers.

`python tests/census/census.py` takes them all and writes CENSUS.md; with kinds as arguments it prints their rows.
"""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from census import table
from census.table import Row
from census.tiny_checkpoints import save_checkpoint, text_model
from prefill_router.common.errors import UserError, one_line
from prefill_router.common.schema import POOLINGS
from prefill_router.encoder.encoder_spec import EncoderSpec
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.tokenization import Tokens
from reference import relative_error, states_alone
from tiny import VOCABULARY, save_word_tokenizer

# Activations are float16: a vector that is right differs by its rounding, 2^-11 at most, and by float32's sums.
EXACT = 1e-3
# So many times the mean error of transformers in bfloat16, both against float32, is allowed in bfloat16.
LOOSE = 3.0

# The class of what is published of a kind, where transformers' mapping names another.
_PUBLISHED = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "shieldgemma2": "ShieldGemma2ForImageClassification",
}

_WAYS = {"PackedBackbone": "packed", "HookedBackbone": "general"}

_RNG = np.random.default_rng(0)


def _random_ids(num_tokens: int) -> list[int]:
    return [int(i) for i in _RNG.integers(6, len(VOCABULARY), num_tokens)]


_PREFIX = _random_ids(60)
# Shorter and longer than the windows of the tiny models, and enough that share a prefix to have it computed once.
COMPANY = [_random_ids(4), _random_ids(28), _random_ids(1), _random_ids(15), _PREFIX + _random_ids(2)]
SHARING = [_PREFIX + _random_ids(i) for i in range(1, 9)]

Encoded = Mapping[str, NDArray[Any]]


class NoReferenceError(Exception):
    """transformers itself has no states of a text alone."""


def causal_lms() -> dict[str, str]:
    """Each model type that transformers calls a causal LM, and the class of its published checkpoints."""
    causal, conditional = _mappings()
    return {kind: _PUBLISHED.get(kind) or conditional.get(kind, name) for kind, name in causal.items()}


def conditional_lms() -> dict[str, str]:
    """The other model types that write text, given images and text."""
    causal, conditional = _mappings()
    return {kind: _PUBLISHED.get(kind, name) for kind, name in conditional.items() if kind not in causal}


def _mappings() -> tuple[dict[str, str], dict[str, str]]:
    from transformers.models.auto import modeling_auto as auto

    return auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def row_of(kind: str) -> Row:
    """Makes a checkpoint of one kind, reads it, and says what came of it."""
    class_name = {**causal_lms(), **conditional_lms()}[kind]
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        folder = Path(scratch) / "model"
        folder.mkdir()
        torch.manual_seed(zlib.crc32(kind.encode()))
        try:
            save_checkpoint(kind, class_name, folder)
        except Exception as error:  # whatever a model's class raises
            return Row(kind, class_name, f"not built: {_told(error, folder)}")
        save_word_tokenizer(folder, chat_template=None)
        try:
            return _compared(kind, class_name, folder)
        except NoReferenceError as error:
            return Row(kind, class_name, f"not built: transformers runs it on no text alone: {error}")
        except UserError as error:
            return Row(kind, class_name, f"refused: {_text(error, folder)}")
        except Exception as error:  # a defect of the encoder
            return Row(kind, class_name, f"traceback: in {_place(error)}: {_told(error, folder)}")


def _compared(kind: str, class_name: str, folder: Path) -> Row:
    encoder = _load(folder, "float32")
    company = _encode(encoder, COMPANY)
    alone = _joined(_encode(encoder, [ids]) for ids in COMPANY[:2])
    sharing = _encode(encoder, SHARING)
    cut = _encode(encoder, COMPANY, layers=[1])
    try:
        bfloat16 = _load(folder, "bfloat16")
    except UserError as error:
        return Row(kind, class_name, f"refused in bfloat16: {_text(error, folder)}")
    rounded = _encode(bfloat16, COMPANY)
    rounded_alone = _joined(_encode(bfloat16, [ids]) for ids in COMPANY)

    of_all = _expected(class_name, folder, [*COMPANY, *SHARING[-2:]], torch.float32)
    expected = {name: values[: len(COMPANY)] for name, values in of_all.items()}
    if set(expected) != set(company):
        return Row(kind, class_name, f"wrong: {len(company) // 2} layers, transformers has {len(expected) // 2}")
    errors = {
        "alone": _errors(alone, {name: values[: len(alone[name])] for name, values in expected.items()}),
        "company": _errors(company, expected),
        "prefix": _errors(_rows(sharing, -2), _rows(of_all, -2)),
        "depth": _errors(cut, company),
    }
    worst = {name: float(each.max()) for name, each in errors.items()}
    theirs = _errors(_expected(class_name, folder, COMPANY, torch.bfloat16), expected).mean()
    ours = _errors(rounded, expected).mean()
    wrong = [name for name, error in worst.items() if not error < EXACT]
    wrong += ["bfloat16"] if not ours < LOOSE * theirs + EXACT else []
    outcome = f"wrong: {', '.join(wrong)}" if wrong else f"exact ({_WAYS[type(encoder.backbone).__name__]})"
    apart = _errors(rounded_alone, rounded).mean()
    return Row(kind, class_name, outcome, max(worst.values()), float(ours), float(apart))


def _load(folder: Path, dtype: str) -> PrefillEncoder:
    return PrefillEncoder.load(EncoderSpec.model_validate({"model": str(folder), "dtype": dtype}), device="cpu")


def _encode(encoder: PrefillEncoder, prompts: list[list[int]], layers: Any = "all") -> Encoded:
    """`encode` behind the tokenizer: transformers gives some kinds a tokenizer of its own, whatever they come with."""
    tokens = Tokens(prompts, np.array([len(ids) for ids in prompts], np.int32))
    encoded, _work = encoder.forward(tokens, encoder.columns(layers, POOLINGS))
    return {name: values for name, values in encoded.items() if name != "num_tokens"}


def _expected(class_name: str, folder: Path, prompts: Sequence[list[int]], dtype: torch.dtype) -> Encoded:
    """What `_encode` must return, by transformers."""
    states = _states(text_model(class_name, folder, dtype), prompts)
    layers = range(len(states[0]))
    last = {f"last_{i:03d}": np.stack([each[i][-1] for each in states]) for i in layers}
    return last | {f"mean_{i:03d}": np.stack([each[i].mean(0) for each in states]) for i in layers}


def _states(model: Any, prompts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
    """Those of the whole model, or of its decoder, where the whole is not run without an image."""
    for reads_text in (lambda: model, model.get_decoder):
        try:
            return states_alone(reads_text(), prompts)
        except Exception as error:  # whatever a model's class raises
            reason = f"{type(error).__name__}: {one_line(error)}"
    raise NoReferenceError(reason)


def _joined(encoded: Iterable[Encoded]) -> Encoded:
    each = list(encoded)
    return {name: np.concatenate([columns[name] for columns in each]) for name in each[0]}


def _rows(encoded: Encoded, first: int) -> Encoded:
    return {name: values[first:] for name, values in encoded.items()}


def _errors(encoded: Encoded, expected: Encoded) -> NDArray[np.float64]:
    """The relative error of each vector of `encoded`."""
    return np.stack([relative_error(values, expected[name]) for name, values in encoded.items()])


def _told(error: Exception, folder: Path) -> str:
    return f"{type(error).__name__}: {_text(error, folder)}"


def _text(error: Exception, folder: Path) -> str:
    """An error's text, the same on every machine each time, and short."""
    text = one_line(error).replace(str(folder), "MODEL").replace("|", "/")
    return re.sub(r"0x[0-9a-f]+", "0x", text)[:160].strip()


def _place(error: Exception) -> str:
    """The last function of ours that an exception went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "prefill_router" in frame.filename]
    return f"{frames[-1].name} ({Path(frames[-1].filename).name})" if frames else "the census"


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its advice, which tiny models of random weights get much of."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _counted(kinds: Iterable[str]) -> Iterator[Row]:
    for kind in kinds:
        row = row_of(kind)
        print(row, flush=True)  # noqa: T201 - a program's output
        yield row


def main(chosen: Sequence[str]) -> None:
    torch.set_num_threads(1)
    if chosen:
        list(_counted(chosen))
        return
    sections = {"Causal LMs": causal_lms(), "Conditional generation": conditional_lms()}
    table.write({title: list(_counted(kinds)) for title, kinds in sections.items()}, LOOSE)


if __name__ == "__main__":
    main(sys.argv[1:])

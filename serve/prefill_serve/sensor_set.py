"""The encoders of an engine. Where a router has several, those that fail are left out until they work again.

An encoder is missing if it cannot be loaded, is not the one of training, or failed on several batches in a row. It is
tried again in the background, after pauses that grow. The last encoder is never left out, nor is a router's only one.
"""

# N prompts, D hidden size

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prefill_router.common.schema import ActivationColumn
from prefill_router.corpus.reader import Prompt
from prefill_router.encoder import sensors
from prefill_router.encoder.prefill_encoder import PrefillEncoder
from prefill_router.encoder.prefix_cache import PrefixCache
from prefill_router.encoder.sensors import Sensor, SensorTokens
from prefill_router.encoder.tokenization import Tokens

log = logging.getLogger("ray.serve")

REMEMBERED_TOKENS = 16_384  # cached prefix tokens: about 12 KB each in SmolLM2's lower half
_FAILURES = 3  # in a row, before an encoder is left out
_PAUSE_S = 1.0  # doubled by each failed try
_LONGEST_PAUSE_S = 60.0
_TEST_PROMPT = "Hello."


class SensorSet:
    """A router's encoders by name: those in use, and why the others are missing. Threads may share it."""

    def __init__(self, sources: Mapping[str, str], load: Callable[[str], Sensor]) -> None:
        """Loads each encoder with `load`, which takes a name. `sources` has the locations by name, for users.

        Raises the first one's error if none can be loaded.
        """
        self.sources, self._load_one = sources, load
        self.in_use: dict[str, Sensor] = {}  # in the order of `sources`; replaced as a whole
        self.reasons: dict[str, str] = {}  # why encoders are missing, by name
        self._failures: Counter[str] = Counter()  # on batches, in a row
        self._lock, self._closed = Lock(), Event()
        errors: dict[str, Exception] = {}
        for name in sources:
            try:
                self.in_use[name] = self._load(name)
            except Exception as error:
                errors[name] = error
        if not self.in_use:
            raise next(iter(errors.values()))
        for name in errors:
            self._miss(name, errors[name], None)

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of the encoders that are not in use."""
        return self._others(self.in_use)

    def close(self) -> None:
        """Ends the tries to get missing encoders back."""
        self._closed.set()

    def tokenize(self, prompt: Prompt) -> SensorTokens:
        """Tokenises a prompt for the encoders in use. Raises UserError if a chat template rejects it."""
        return sensors.tokenize(self.in_use, [prompt])

    def read(
        self, tokens: SensorTokens, columns: Collection[ActivationColumn]
    ) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
        """Runs the encoders that have tokens in turn.

        Returns the activations (N, D) of `columns` by name, and the encoders that are left out. Raises the last
        failure if all have failed.
        """
        activations: dict[str, NDArray[Any]] = {}
        used: list[str] = []
        failure: Exception = RuntimeError("no encoder has the tokens of all prompts of the batch")
        for name, sensor in self.in_use.items():
            if name in tokens:
                try:
                    activations |= self._read_one(name, sensor, tokens[name], columns)
                    used.append(name)
                    del self._failures[name]
                except Exception as error:
                    self._fail(name, failure := error)
        if not used:
            raise failure
        return activations, self._others(used)

    def _others(self, names: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.sources if name not in names)

    def _read_one(
        self, name: str, sensor: Sensor, tokens: Tokens, columns: Collection[ActivationColumn]
    ) -> dict[str, NDArray[Any]]:
        """Raises ValueError for activations that are not finite, where other encoders can do without them."""
        activations = sensors.read({name: sensor}, {name: tokens}, columns)
        if len(self.sources) > 1 and not all(np.isfinite(values).all() for values in activations.values()):
            raise ValueError("its activations are not finite")
        return activations

    def _load(self, name: str) -> Sensor:
        sensor = self._load_one(name)
        if isinstance(sensor, PrefillEncoder):
            sensor.prefix_cache = PrefixCache(REMEMBERED_TOKENS)
        return sensor

    # --- missing encoders ----------------------------------------------------------------------------------------

    def _fail(self, name: str, error: Exception) -> None:
        """Counts a failure on a batch. The encoder is left out after several in a row, unless it is the last."""
        with self._lock:
            self._failures[name] += 1
            is_due = self._failures[name] >= _FAILURES and name in self.in_use and len(self.in_use) > 1
            if not is_due:
                if len(self.sources) > 1:
                    log.warning("an encoder failed on a batch", extra={"encoder": name, "reason": _reason(error)})
                return
            held = self.in_use[name]
            self.in_use = {other: sensor for other, sensor in self.in_use.items() if other != name}
            self._miss(name, error, held)

    def _miss(self, name: str, error: Exception, held: Sensor | None) -> None:
        self.reasons = {**self.reasons, name: _reason(error)}
        log.error("an encoder is missing", extra={"encoder": name, "reason": self.reasons[name]})
        Thread(target=self._recover, args=(name, held), name="encoder", daemon=True).start()

    def _recover(self, name: str, held: Sensor | None) -> None:
        """Tries until the encoder works: first the one that was `held`, then one that is loaded anew."""
        torch.set_num_threads(1)  # the other cores are the lanes'
        pause_s = _PAUSE_S
        while not self._closed.wait(pause_s):
            try:
                sensor = self._load(name) if held is None else held
                self._read_one(name, sensor, sensor.tokenize([_TEST_PROMPT]), _deepest(name, sensor))
            except Exception as error:
                with self._lock:
                    self.reasons = {**self.reasons, name: _reason(error)}
                held, pause_s = None, min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                self._take_back(name, sensor)
                return

    def _take_back(self, name: str, sensor: Sensor) -> None:
        with self._lock:
            del self._failures[name]
            self.reasons = {other: reason for other, reason in self.reasons.items() if other != name}
            now = {**self.in_use, name: sensor}
            self.in_use = {other: now[other] for other in self.sources if other in now}
        log.info("an encoder is in use again", extra={"encoder": name})


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _deepest(name: str, sensor: Sensor) -> list[ActivationColumn]:
    return [column.of(name) for column in sensor.identity.columns([sensor.num_layers], ["last"])]

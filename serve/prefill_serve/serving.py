"""The loaded settings, engine and heads of an endpoint. Built completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefill_router.baselines import any_router
from prefill_router.common.errors import UserError
from prefill_router.policy.pool import load_pool
from prefill_router.router.artifact import Router
from prefill_serve.engine import Engine, Head
from prefill_serve.sensor_set import SensorSet
from prefill_serve.settings import Settings


@dataclass(frozen=True)
class Serving:
    settings: Settings
    engine: Engine
    primary: Head
    canary: Head | None
    shadow: Head | None
    stamps: tuple[str, ...] = ()  # of the routers' artifacts, before they were read

    @classmethod
    def load(
        cls,
        settings: Settings,
        num_threads: int,
        current: Serving | None = None,
        wait_for: Callable[[str], None] = lambda _: None,
    ) -> Serving:
        """Loads the routers, and the encoders unless `current` has the same ones. Tells `wait_for` what it loads.

        Raises UserError for settings that cannot be loaded: a missing or damaged artifact, a pool with targets that the
        router does not know, a canary or shadow on another encoder, no encoder that can be loaded.
        """
        wait_for("the router to load")
        stamps = router_stamps(settings)
        primary, canary, shadow = _heads(settings)
        for head in (primary, canary, shadow):
            if head is not None and isinstance(head.router, Router):
                _ = head.router.distance  # compute it now, not on the first prompt
        is_same = current is not None and _encoders(current.primary) == _encoders(primary)
        if current is not None and is_same:
            return cls(settings, current.engine, primary, canary, shadow, stamps)
        wait_for("the encoder to load")
        encoders = SensorSet(_sources(primary), primary.router.load_sensor)
        return cls(settings, Engine(encoders, num_threads), primary, canary, shadow, stamps)

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Raises UserError as `load` does, without reading the encoder's weights."""
        primary, _, _ = _heads(settings)
        primary.router.require_encoders()

    @property
    def heads(self) -> list[Head]:
        return [head for head in (self.primary, self.canary, self.shadow) if head is not None]

    def asked(self, head: Head) -> list[Head]:
        """The heads to run on a prompt that `head` answers: the shadow runs too."""
        return [head] if self.shadow is None else [head, self.shadow]

    def head_for(self, digest: bytes) -> Head:
        """The head that answers a prompt: router or canary, by the prompt's content digest."""
        place = int.from_bytes(digest[:8], "big") / 2**64
        if self.canary is not None and self.settings.canary is not None and place < self.settings.canary.share:
            return self.canary
        return self.primary


def router_stamps(settings: Settings) -> tuple[str, ...]:
    """Changes when another artifact is written to the path of the router, the canary or the shadow."""
    canary = settings.canary.router if settings.canary else None
    return tuple(any_router.stamp(uri) for uri in (settings.router, canary, settings.shadow) if uri is not None)


def _heads(settings: Settings) -> tuple[Head, Head | None, Head | None]:
    primary = _head(settings, settings.router)
    canary = _head(settings, settings.canary.router) if settings.canary else None
    shadow = _head(settings, settings.shadow) if settings.shadow else None
    for role, head in (("canary", canary), ("shadow", shadow)):
        if head is not None and _encoders(head) != _encoders(primary):
            raise UserError(f"{role}: uses another encoder than the router: train it on the router's encoder")
    if settings.safe and settings.safe.target not in primary.router.pool.target_names:
        raise UserError(f'safe: target "{settings.safe.target}" is not in the pool')
    _check_default(settings, primary)
    return primary, canary, shadow


def _check_default(settings: Settings, primary: Head) -> None:
    """Raises UserError if the default target has no upstream."""
    default = settings.gateway.default_target if settings.gateway is not None else None
    able = [target.name for target in primary.router.pool.targets if target.upstream is not None]
    if default is not None and default not in able:
        raise UserError(f'default_target: "{default}" must be one of the targets with an upstream: {", ".join(able)}')


def _head(settings: Settings, uri: str) -> Head:
    router = any_router.load(uri)
    version = router.version
    if settings.pool is not None:
        router = router.with_pool(load_pool(settings.pool))
    tolerance = router.default_tolerance if settings.tolerance is None else settings.tolerance
    return Head(router, version, tolerance)


def _encoders(head: Head) -> dict[str, str]:
    """The fingerprints of the encoders that a router reads with, by name."""
    router = head.router
    if isinstance(router, Router):
        return {name: identity.fingerprint for name, identity in router.encoders.items()}
    return {"": router.fingerprint}


def _sources(head: Head) -> dict[str, str]:
    """Where the encoders that a router reads with are loaded from, by name."""
    router = head.router
    if isinstance(router, Router):
        return {name: identity.spec.model for name, identity in router.encoders.items()}
    return {"": router.sentence_encoder}

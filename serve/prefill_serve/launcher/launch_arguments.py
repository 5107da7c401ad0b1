"""The application's arguments from those of `serve`, and what can be told of them before Ray and torch are imported."""

from __future__ import annotations

from prefill_router import storage
from prefill_router.common.addresses import is_loopback, ray_address, require_free
from prefill_router.common.console import say
from prefill_router.common.errors import UserError
from prefill_router.common.validation import validate
from prefill_router.policy.pool import load_pool
from prefill_serve.launcher.serve_options import ServeConfig
from prefill_serve.settings import AppArgs


def checked_arguments(config: ServeConfig) -> AppArgs:
    """Converts the command's config. Raises UserError as `app_arguments` does, and for a port in use here."""
    arguments = app_arguments(config)
    if ray_address() is None:
        require_free(config.port, config.host)
    return arguments


def app_arguments(config: ServeConfig, revision: int = 0) -> AppArgs:
    """Converts the command's config. Raises UserError if others could reach an endpoint without keys."""
    most = max(config.replicas, config.max_replicas or 0)
    keys = storage.read_toml(config.keys) if config.keys else {}
    if not keys and not is_loopback(config.host):
        raise UserError(f"serve: host = {config.host} is reachable by others: set --keys, or listen on 127.0.0.1")
    arguments = {**config.arguments(), "keys": keys, "open": not keys, "revision": revision}
    if config.canary is None:
        del arguments["canary"]
    if config.safe_target is None:
        del arguments["safe"]
    if config.to_zero or most > config.replicas:
        arguments["autoscaling"] |= {"min_replicas": 0 if config.to_zero else config.replicas, "max_replicas": most}
    else:
        del arguments["autoscaling"]
    if config.feedback or _has_upstreams(config):
        folder = config.feedback and storage.absolute(config.feedback)
        budgets = storage.read_toml(config.budgets) if config.budgets else {}
        arguments["gateway"]["ledger"] |= {"folder": folder, "budgets": budgets}
    else:
        del arguments["gateway"]
    return validate(AppArgs, arguments, config.keys or "serve")


def _has_upstreams(config: ServeConfig) -> bool:
    return config.pool is not None and any(target.upstream for target in load_pool(config.pool).targets)


def warn_of_unset_keys(config: ServeConfig) -> None:
    """Names the environment variables without which upstreams would refuse calls."""
    for target in load_pool(config.pool).targets if config.pool is not None else ():
        if target.upstream is not None and target.upstream.key == "":
            say(f'serve: target "{target.name}": {target.upstream.key_env} is not set: its upstream will refuse calls')

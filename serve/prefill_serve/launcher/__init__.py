"""How an endpoint is started, scaled, reloaded and ended."""

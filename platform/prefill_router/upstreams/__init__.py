"""HTTP to upstreams, for `collect` and for the gateway."""

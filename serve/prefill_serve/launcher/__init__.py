"""The commands `prefill-router serve` and `prefill-router key`: start, reload and stop an endpoint.

Start with `command`. `serve_options` holds the flags, `foreground` runs the endpoint, `haproxy` configures its proxy.
"""

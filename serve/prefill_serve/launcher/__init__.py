"""The commands `prefill-router serve` and `prefill-router key`: start, reload and stop an endpoint.

Start with `command`. `serve_options` holds the flags, which `launch_arguments` converts and checks; `foreground` runs
the endpoint, and `haproxy` configures its proxy.
"""

"""ASGI middleware in front of the API: request id, origin check, key, body limits, attempts at a request and metrics.

Start with `gate`, which runs the checks in order.
"""

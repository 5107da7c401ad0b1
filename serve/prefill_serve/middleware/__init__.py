"""ASGI middleware in front of the API: request id, origin check, key, body limits, crash counting and metrics.

Start with `gate`, which runs the checks in order.
"""

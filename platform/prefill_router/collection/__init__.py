"""Asking targets for answers that routers learn from: limited, paid for once, and kept before anything else is done."""

"""The `prefill-router` command line. Start with `command_line.py`; `flags.py` turns config models into flags."""

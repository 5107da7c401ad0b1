"""Corpora: reads prompts from files of many formats, plans them into shards, and splits them for training and tests.

Start with `reader`, which yields each row as a valid prompt or with the reason why it is invalid. `plan` cuts a corpus
into shards; `split` and `split_groups` decide which prompts are in the test part.
"""

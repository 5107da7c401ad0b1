"""Activations joined with graded answers: the input of probing, training and evaluation.

Start with `graded_store.py`. `prompt_split.py` and `leakage.py` keep training and held-out prompts apart.
"""

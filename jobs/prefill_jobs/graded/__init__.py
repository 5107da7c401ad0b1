"""Activations joined with graded answers: the input of probing, training and evaluation.

Start with `graded_store`. `prompt_split` and `leakage` keep training and held-out prompts apart.
"""

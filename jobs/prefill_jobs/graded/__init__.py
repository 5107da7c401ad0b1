"""Activations joined with graded answers: what probes, training and evaluation read."""

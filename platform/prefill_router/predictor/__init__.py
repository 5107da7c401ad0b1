"""Predicts P(correct) and the answer length of every target from features of a prompt.

`trunk` and `kernel_ridge` are the two models, `stacking` and `calibration` turn their outputs into probabilities, and
`training` fits the trunk on any number of workers; `stand_in` replaces the features of a missing encoder. Start with
`recipe`, which lists every training setting.
"""

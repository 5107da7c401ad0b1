"""P(correct) of every target: SharedTrunkNet, the kernel machine beside it, their calibration."""

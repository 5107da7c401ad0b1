"""`extract`: runs a corpus through the encoder and stores activations. Start with `extract_job.py`, the driver.

Other jobs that read prompts with the encoder share its fault tolerance, `guarded_encoder.py`.
"""

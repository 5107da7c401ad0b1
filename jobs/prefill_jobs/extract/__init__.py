"""`extract`: runs a corpus through the encoder and stores activations. Start with `extract_job`, the driver.

Other jobs that read prompts with an encoder share the base of its actors, `encoder_actor`.
"""

"""A whole query log: estimates of its prompts, a budget for all of them, sums by shard, samples."""

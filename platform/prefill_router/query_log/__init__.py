"""Routes a whole query log: estimates of each prompt, a budget for the log, totals by segment, samples to label.

Everything here works on arrays of one shard; jobs combine the shards. Start with `assignment`, which picks the target
of each line.
"""

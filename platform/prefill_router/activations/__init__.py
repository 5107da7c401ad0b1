"""The activation store, and the commit log that records which of its shards are done.

Start with `activation_store`, what readers see. `shard_builder` builds and commits a shard, `commit_log` keeps the
records of committed shards, and `reuse` finds shards whose activations can be copied.
"""

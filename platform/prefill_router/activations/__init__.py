"""The activation store, and the log of commits that makes its shards once and never twice."""

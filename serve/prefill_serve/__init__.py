"""The routing endpoint: encoder and head in one Ray Serve replica."""

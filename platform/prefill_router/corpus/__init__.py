"""Prompts: files of any format, row by row, cut into shards and split into train, validation and test."""

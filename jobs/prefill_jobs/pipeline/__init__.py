"""`pipeline`: from a corpus and outcomes to a published router."""

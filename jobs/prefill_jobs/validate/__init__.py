"""`validate`: all that is wrong with a corpus, outcomes and a pool, before anything is computed."""

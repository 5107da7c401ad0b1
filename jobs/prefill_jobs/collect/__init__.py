"""`collect`: a corpus and a pool in, the targets' graded answers out."""

"""`demo` and `quickstart`: every step end to end. `walkthrough` has the steps; the others prepare their data."""

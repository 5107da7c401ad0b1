"""How jobs meet Ray, and what they say while they run."""

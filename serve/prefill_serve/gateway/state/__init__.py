"""What outlives a call: money, conversations, decisions until their feedback comes."""

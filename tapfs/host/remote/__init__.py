"""Files that lie elsewhere: what an address means, how its bytes come, and the local copy that the engine reads."""

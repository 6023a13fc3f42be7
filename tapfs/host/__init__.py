"""The host's files: judge a name, then open, lock, or create the file that the name means."""

"""The manual pages and the completions of shells, made from the parsers of the commands and from the drivers."""

"""The command line: one file for each group of commands. Each parses, calls the API and shows what it returns."""

"""What rayexpand and its peers make of one plan when they are killed: `python -m tests.benchmarks.peers --help`."""

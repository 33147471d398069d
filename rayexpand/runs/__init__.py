"""One expansion: configuration, inputs, plan, shards, commits, driver loop, and what is said of it afterwards."""

"""Making artifacts: what methods need and a dataset has not."""

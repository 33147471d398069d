"""Pages and dataset cards."""

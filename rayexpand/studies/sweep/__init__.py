"""Search over the fields of a study."""

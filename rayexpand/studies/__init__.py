"""Does it help: the same classifier trained on every arm of a study, and sweeps over its fields."""

"""What a classifier is fed: training set, order of an epoch, decoded and augmented batches."""

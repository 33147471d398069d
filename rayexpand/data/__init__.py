"""Labelled images in: every layout to one index and a reader, pixels, subsets, batches."""

"""What methods need of a dataset, as folders of files found by what they were made from."""

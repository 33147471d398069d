"""Loops: runs in rounds, the samples of each dealt by what classifiers make of those before."""

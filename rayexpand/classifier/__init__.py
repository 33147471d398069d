"""Tensors of classifiers: recipe, networks, augmentation, mixing, accuracy."""

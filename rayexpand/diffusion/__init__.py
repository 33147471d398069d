"""Tensors of generators: noise process, solvers, perturbation, energies, prototypes."""

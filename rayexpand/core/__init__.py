"""Sampling, training and measuring on tensors: torch and diffusers only; no files, no model names, no Ray."""

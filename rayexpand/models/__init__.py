"""Generators, guides and adapters: where their folders are, what their files say, loading them."""

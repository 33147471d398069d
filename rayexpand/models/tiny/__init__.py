"""Small generators trained here; the embedded default on digits is one of them."""

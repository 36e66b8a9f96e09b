"""One desk experiment per paper."""

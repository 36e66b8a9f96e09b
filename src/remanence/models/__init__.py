"""Models: loading and saving, roles of weights, desk models."""

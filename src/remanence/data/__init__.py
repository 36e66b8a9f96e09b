"""Data: readers, generators with ground truth, encoding."""

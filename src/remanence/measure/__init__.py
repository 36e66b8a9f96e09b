"""Probes, and the formulas of the field."""

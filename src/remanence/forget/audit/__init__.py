"""Audits of forgetting: one file per attack."""

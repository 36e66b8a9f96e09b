"""Forgetters: one file each."""

"""Neural memories: one file each."""

"""Nights: one directory for each, run in order by one process at a time."""

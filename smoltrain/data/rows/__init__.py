"""Rows: which tokens a step trains on, from files or streams, dealt to the ranks."""

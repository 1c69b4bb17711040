"""Runs seen from outside: a table of all, one live in a terminal, several compared. Reads files, and writes none."""

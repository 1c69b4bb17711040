"""The library: what `import smoltrain` offers to a program; each name is one of these files, or of a room below."""

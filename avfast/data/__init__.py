"""Data sets (`registry`; each is a file with its settings), the clip store that they fill, and its batches."""

"""Models to compare the paper's with, one file each (docs/extending.md)."""

"""What every part of avfast raises for a mistake of the user's."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave: one line that names the argument, the value and what was expected. Commands
    print it as one line and end with exit status 2."""

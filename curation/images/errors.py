"""Errors that are caught where the models themselves are not needed."""


class EncoderError(Exception):
    """A model or weights that can't be used: names the recipe field and what would be right."""

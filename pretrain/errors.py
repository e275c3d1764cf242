"""The one exception that a user's own mistake raises; the command line prints it as one line."""


class UserError(Exception):
    """A mistake in what the user gave. Its text names the value and what would be right."""

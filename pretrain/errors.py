"""The one exception that a user's own mistake raises; the command line prints it as one line."""


class UserError(ValueError):
    """A mistake in what the user gave. Its text names the value and what would be right.

    A ValueError, so that a check of one section of a configuration is listed with all the others.
    """

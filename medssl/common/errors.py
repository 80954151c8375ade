"""Errors whose one line is for the user."""


class UserError(ValueError):
    """Something that the user can mend: one line, exit status 2."""


class Full(UserError):
    """A file could not be written, most often because the disk is full: exit status 1."""

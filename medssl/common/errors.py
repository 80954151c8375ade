"""The one class of error that is told to the user in a line: what was wrong, which file or flag, what to do."""


class UserError(ValueError):
    """Something that the user can mend. The scripts print it without a traceback; all other errors keep theirs."""

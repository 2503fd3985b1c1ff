"""The error that a user reads."""


class ExtensionError(Exception):
    """One sentence that says what was expected, what was found and what to do."""

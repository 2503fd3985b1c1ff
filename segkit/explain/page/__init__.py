"""The offline page of an explanation."""

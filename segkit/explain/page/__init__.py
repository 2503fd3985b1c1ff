"""The HTML page of an explanation, which works offline."""

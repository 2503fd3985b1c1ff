"""`segkit demo`: train, segment and write attention maps in minutes, without any data."""

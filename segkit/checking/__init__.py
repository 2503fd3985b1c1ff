"""`segkit check`: a description of a config, a dataset or a volume as segkit reads it."""

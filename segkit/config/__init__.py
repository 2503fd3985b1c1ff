"""Settings, as written in YAML and checked by pydantic."""

"""How well a map picks out each structure."""

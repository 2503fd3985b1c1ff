"""How far attention heads reach and what they are worth."""

"""Attention heads: the distance over which they attend, and their effect on Dice."""

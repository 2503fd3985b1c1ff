"""Experiments on gates, and the rule that derives verdicts from them."""

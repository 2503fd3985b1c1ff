"""Experiments on gates, and the rule that gives each a word."""

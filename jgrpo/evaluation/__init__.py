"""Scores of a policy, and the tables of them."""

"""Fewer tokens from given blocks on: `prune.TokenPruning`."""

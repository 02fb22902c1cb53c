"""Hydra configs: one primary config per command, and the groups it chooses from."""

"""Engines side by side on one machine: the measurements of `mnemosyne bench`."""

"""Engines side by side on one machine: what `mnemosyne bench` measures, and how."""

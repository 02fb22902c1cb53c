"""Serving on hardware nobody has at hand: step times, a cluster, plans. No torch."""

"""Serving on hardware that is not there: step times, a cluster, plans. No torch."""

"""Joins the rooms: the one place that knows all of them. Config in, an engine out."""

"""Serving: the engine loop, the offline API, ids to text, HTTP."""

"""Programs that run in the interpreter of an engine; they import nothing of this package but ours.

A file here has ``open_engine(settings)``, which gives an object with ``about`` (a dict),
``add(index, request)``, ``step() -> [(index, token_id)]`` and ``stop()``. ``main.py`` runs it.
"""

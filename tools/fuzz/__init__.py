"""A seeded fuzzer: inputs for every door of the engine, accepted or refused by name, nothing else.

A door is one file here: a generator function that yields a ``Door``, listed in ``__main__``.
"""

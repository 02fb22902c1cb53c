"""The HTTP side: an app over a backend. Needs the extra ``serve``."""

"""The version, also where the package runs from a checkout that nobody installed."""

VERSION = "0.1.0"

"""Tests, one folder per room of the package; exactness/ holds the claims about the whole."""

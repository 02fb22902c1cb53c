"""Attention backends over a paged cache, and the log-sum-exp merge of their partials."""

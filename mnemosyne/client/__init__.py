"""A client of OpenAI-compatible servers, of ours and of others, from the standard library."""

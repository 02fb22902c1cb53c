"""Load for OpenAI-compatible servers: requests at set moments, and the outcome of each."""

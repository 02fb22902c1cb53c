"""Load for OpenAI-compatible servers: requests at set moments, and what came of every one."""

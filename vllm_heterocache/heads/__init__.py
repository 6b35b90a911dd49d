"""KV heads: their profile, their roles, and their share of a prompt's pages."""

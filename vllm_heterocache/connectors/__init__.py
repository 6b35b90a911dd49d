"""What stands in vLLM's KV-connector slot: our connector, and vLLM's own beside it."""

"""What vLLM calls in each layer and each step: the attention backend and its metadata."""

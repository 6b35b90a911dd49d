"""The scheduler's side: blocks of the KV pool and the orders that give them back."""

"""The command `heterocache` and its sub-commands."""

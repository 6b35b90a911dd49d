"""Pages on the host: their pool, and the copies to and from it."""

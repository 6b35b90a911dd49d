"""The worker's side: what holds, moves and reads the pages of one rank."""

"""Tables, plots and statistics of a run folder."""

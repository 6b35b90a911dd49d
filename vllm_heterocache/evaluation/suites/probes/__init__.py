"""Work on a long text that is more than recall of a number, asked for during decode."""

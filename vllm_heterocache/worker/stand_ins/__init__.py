"""What evicted tokens leave behind in a prompt's stand-in pages; means are an operation (ops/)."""

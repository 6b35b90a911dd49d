"""What is kept of a prompt's queries while it is prefilled."""

"""What the commands in the folder above share; nothing here is run by itself."""

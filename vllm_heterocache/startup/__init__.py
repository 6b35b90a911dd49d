"""What happens once, before an engine serves: options, profile, refusals, sizes."""

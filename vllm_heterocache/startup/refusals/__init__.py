"""What start-up refuses, each in one sentence that names the option and the fix."""

"""How a model's head profile is measured and cached."""

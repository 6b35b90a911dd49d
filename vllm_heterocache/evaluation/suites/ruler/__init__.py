"""RULER's 13 tasks."""

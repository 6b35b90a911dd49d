"""`heterocache reproduce`: all evaluations of docs/quality.md with a model of one's own."""

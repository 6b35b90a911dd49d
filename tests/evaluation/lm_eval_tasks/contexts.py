"""Long contexts of short rows, for the tasks of this folder."""

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NUM_LINES = 100  # about 2,400 tokens


def hide(dataset):
    """Add `context` to each row: its `fact` at line number `line` of the noise."""

    def with_context(row):
        lines = [NOISE] * NUM_LINES
        lines.insert(row["line"], row["fact"])
        return {"context": "\n".join(lines)}

    return dataset.map(with_context)

"""What is wrong with a checkpoint, said so that the reader knows which file, which tensor and what to do."""


class CheckpointError(ValueError):
    """A checkpoint (or the place for one) that cannot be used: the message names file, tensor, rule and way out."""


def listing(lines: list[str], limit: int = 12) -> str:
    """The lines of a long complaint, indented; past `limit` only their number, so that the rule stays on the screen."""
    shown = lines if len(lines) <= limit + 1 else [*lines[:limit], f"... and {len(lines) - limit} more"]
    return "".join(f"\n  {line}" for line in shown)

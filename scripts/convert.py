"""Convert a checkpoint: python scripts/convert.py SOURCE TARGET --to orbax. The same as `jaxengine convert`."""

from jaxengine.command import convert, start_jax

if __name__ == "__main__":
    start_jax()
    convert()

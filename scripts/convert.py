"""Convert a checkpoint: python scripts/convert.py SOURCE TARGET --to orbax. The same as `jaxengine convert`."""

from jaxengine.command import convert_script

if __name__ == "__main__":
    convert_script()

"""Continue a prompt: python scripts/generate.py FOLDER PROMPT. The same as `jaxengine generate`."""

from jaxengine.command import generate_script

if __name__ == "__main__":
    generate_script()

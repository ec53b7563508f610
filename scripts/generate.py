"""Continue a prompt: python scripts/generate.py FOLDER PROMPT. The same as `jaxengine generate`."""

from jaxengine.command import generate, start_jax

if __name__ == "__main__":
    start_jax()
    generate()

"""Plan for a card and a budget: python scripts/plan.py FOLDER --gpu rtx4090 --memory 16GB. The same as `jaxengine plan`."""

from jaxengine.command import plan, start_jax

if __name__ == "__main__":
    start_jax()
    plan()

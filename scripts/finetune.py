"""Fine-tune a model: python scripts/finetune.py FOLDER DATA --out OUT. The same as `jaxengine finetune`."""

from jaxengine.command import start_anew_with_large_pages, start_jax
from jaxengine.finetune.command import finetune

if __name__ == "__main__":
    start_anew_with_large_pages()
    start_jax()
    finetune()

"""Quantise a model by text: python scripts/quantize.py FOLDER TEXT --out OUT. The same as `jaxengine quantize`."""

from jaxengine.calibration.command import quantize
from jaxengine.command import start_jax

if __name__ == "__main__":
    start_jax()
    quantize()

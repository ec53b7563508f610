"""Families: one file each, named by Hugging Face's model_type. The file name is the registry.

A family's file has `Config` (with `from_dict` and `kinds`), `Block` (one layer, built from a config and one of its
kinds), `Model` (what stands before and after the layers) and `name_table`.
"""

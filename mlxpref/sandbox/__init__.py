"""The embedded default: a small written world, its gold score, scored data, and a tiny pretrained model.

Everything here is made by ``scripts/build_sandbox.py`` from a seed. It needs no network, and it is small
enough to train in a minute, so that a claim can be tried where one stands.
"""

from pathlib import Path

FILES = Path(__file__).resolve().parent / "files"

MODEL = FILES / "model"
"""A llama of 0.6 million parameters with its tokenizer: loads with mlx-lm and with transformers."""

TRAIN = FILES / "train.jsonl"
VALID = FILES / "valid.jsonl"
TEST = FILES / "test.jsonl"
"""Scored pairs, split by scene."""

LISTS = FILES / "lists.jsonl"
"""Requests with four scored replies each, of training scenes."""

__all__ = ["FILES", "LISTS", "MODEL", "TEST", "TRAIN", "VALID"]

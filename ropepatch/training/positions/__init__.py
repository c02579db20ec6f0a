"""Positions in training: what positions tokens get, and which tokens see each other.

`Collator` makes the batches. `training_attention` puts a model into the state that they are made for, for the time of
training, and proves it on a few tokens:

    with training_attention(model, recipe) as numbered:
        collator = Collator(recipe, target_length, numbered=numbered)
        ...  # train
"""

from ropepatch.training.positions.collator import Collator
from ropepatch.training.positions.prepare import training_attention
from ropepatch.training.positions.skipped import generator_of, pose_positions, random_positions

__all__ = ["Collator", "generator_of", "pose_positions", "random_positions", "training_attention"]

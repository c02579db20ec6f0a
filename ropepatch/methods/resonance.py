"""Resonance YaRN: wavelengths rounded to whole tokens, so that a plane repeats its angles exactly."""

from __future__ import annotations

import dataclasses
import math

import torch

from ropepatch.methods._base import Frequencies, RotaryGeometry, frequency_method
from ropepatch.methods.yarn import YarnOptions, yarn


@frequency_method(
    "resonance",
    aliases=("resonance_yarn",),
    options=YarnOptions,
    paper="arXiv 2403.00071",
    summary="yarn, then every wavelength rounded to whole tokens",
)
def resonance(geometry: RotaryGeometry, options: YarnOptions) -> Frequencies:
    """2 pi / round(2 pi / f'_i) with f' the frequencies of `yarn` and its gain.

    A plane whose wavelength is a whole number meets at long range the very angles it met in training. The
    fastest planes move most (a wavelength of 6.28 becomes 6), so frequencies may also rise, and the method
    wants finetuning. At factor 1 no unseen position is to be met, and nothing changes.
    """
    result = yarn(geometry, options)
    if options.factor == 1:
        return result
    wavelengths = 2 * math.pi / result.inv_freq.double()
    # A plane that stands still has an infinite wavelength, which stays infinite.
    rounded = (2 * math.pi / torch.round(wavelengths)).float()
    return dataclasses.replace(result, inv_freq=rounded, rope_parameters=None)

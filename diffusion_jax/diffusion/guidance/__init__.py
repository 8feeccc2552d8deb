"""Guidance maps denoisers to a denoiser: `pairs` says how, `rules` what changes it; `classifier` needs no pair."""

from diffusion_jax.diffusion.guidance.classifier import by_classifier
from diffusion_jax.diffusion.guidance.memory import Guided, Remembering, as_guided, carried
from diffusion_jax.diffusion.guidance.pairs import Pair, guide, strong_and_weak, with_and_without_label
from diffusion_jax.diffusion.guidance.rules import APG, CFGPlusPlus, Interval, Point, Rescaled, Rule

GUIDANCE_RULES = {"interval": Interval, "rescaled": Rescaled, "apg": APG, "cfg_pp": CFGPlusPlus}

__all__ = [
    "GUIDANCE_RULES",
    "CFGPlusPlus",
    "Guided",
    "Pair",
    "Point",
    "Remembering",
    "Rule",
    "as_guided",
    "by_classifier",
    "carried",
    "guide",
    "strong_and_weak",
    "with_and_without_label",
]

"""What DeiT's users look for under this name: random numbers derived from the seed, and progress reports."""

from sepvit_lib.training.progress import Progress
from sepvit_lib.training.randomness import Stream, derived_seed, seed_cpu, seed_everything

__all__ = ["Progress", "Stream", "derived_seed", "seed_cpu", "seed_everything"]

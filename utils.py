"""Seeded random numbers and progress reports, under the module name that DeiT's users expect."""

from sepvit_lib.common.progress import Progress
from sepvit_lib.common.randomness import Stream, derived_seed, seed_cpu, seed_everything

__all__ = ["Progress", "Stream", "derived_seed", "seed_cpu", "seed_everything"]

"""A run's machinery: what keeps training alive, and what commands share."""

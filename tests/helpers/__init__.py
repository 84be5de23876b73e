"""What several tests use: references, models, ranks, counters of what is launched and read."""

"""Examples: trainers, several ranks, and the demo."""

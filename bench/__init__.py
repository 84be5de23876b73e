"""The bench: what this package costs, timed, counted and compared."""

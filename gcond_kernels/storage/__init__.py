"""Where task gradients live: their layout, the accumulators, and what is saved of them."""

"""Low precision: loss scale, values that are not finite, guarded steps, BatchNorm."""

"""Several ranks: strategies, process groups, consistency between ranks, DDP, FSDP2 and DTensor."""

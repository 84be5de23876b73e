"""What a training run is like: the report of a step, the recorder of many, advice, plots."""

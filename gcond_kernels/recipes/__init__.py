"""Ways to train that build on the recorder or on a mask: Recon, sparse training."""

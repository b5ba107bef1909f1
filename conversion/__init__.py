"""Converting, verifying and publishing checkpoints; small random ones in the released format."""

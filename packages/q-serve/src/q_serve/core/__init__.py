"""What the engine decides with: requests, cache blocks, the scheduler. Pure Python: nothing here imports torch."""

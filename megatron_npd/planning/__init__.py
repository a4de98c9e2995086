"""What a run will need before it runs: memory per rank, hours, storage and the split of nodes, from configurations."""

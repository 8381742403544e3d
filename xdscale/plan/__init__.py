"""What a run will take, on paper: memory, traffic, time and cost, computed without a GPU and without weights."""

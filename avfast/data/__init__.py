"""Data sets: digit images (`digits`), Multimodal MovingMNIST (`mmnist`) and the memory-mapped clip store (`store`)."""

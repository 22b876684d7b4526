"""Evidence: checks whether a batch of weighted draws can be trusted."""

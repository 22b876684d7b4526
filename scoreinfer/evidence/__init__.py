"""Evidence: what says whether a batch of weighted draws can be trusted."""

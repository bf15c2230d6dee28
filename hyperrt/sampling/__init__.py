"""What a request means: prompts, guidance, solvers, the loop and the recipe."""

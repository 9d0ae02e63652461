"""SmolLM2-135M taught to think: the writer of its chains, the recipe of its adapter and the adapter itself."""

"""The steering of vLLM's own OpenAI server: directions by HTTP, presets as models, metrics."""

"""Tasks and chains of thought: records, generation, annotation, and spans as tokens."""

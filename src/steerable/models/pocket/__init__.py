"""The bundled reasoning model: its task families, its language, its recipe and its weights."""

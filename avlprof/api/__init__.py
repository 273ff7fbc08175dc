"""The verbs by name, finding or making what they need: `trace`, `tune`, `sweep`, `smallest`."""

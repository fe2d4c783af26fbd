"""EdgeSplit's client: fine-tune the first blocks of a model on a device that owns its data."""

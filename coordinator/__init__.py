"""The coordinator: plans, runs the rest of the model, aggregates, stores, exports."""

"""Where vectors come from: one module an engine, one protocol (`base.Engine`) for all."""

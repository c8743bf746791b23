"""Reports: what precision a model really uses."""

"""Raw weights as they are published, and what each format says about itself."""

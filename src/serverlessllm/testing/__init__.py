"""What tests of the project, and of a plugin for it, are built from."""

"""PyTorch's zip files, read without running what is in them: their entries, and their pickle.

`archive` reads the zip's directory, `interpreter` the pickle's opcodes; `sandbox` runs the
interpreter in a child process that can do nothing but answer.
"""

"""The ONNX backend suite, every test isolated, held against a table of results that can only rise."""

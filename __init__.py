"""tcompile: a tensor compiler from PyTorch and ONNX models to fast CPU, GPU and FPGA artifacts."""

__version__ = "0.1.0"

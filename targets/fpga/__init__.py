"""FPGA target: integer dataflow networks as Vitis HLS C++ and SystemVerilog."""

"""Weight-only quantization without calibration data: FineQuant, EasyQuant, and both together."""

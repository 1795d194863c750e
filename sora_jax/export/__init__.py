"""Export of a model directory to StableHLO, ONNX and Core ML, checked numerically before it is finished."""

"""What calibration data tells of the inputs of layers, collected block by block."""

"""Statistics of the inputs of linear layers over calibration data, collected block by block."""

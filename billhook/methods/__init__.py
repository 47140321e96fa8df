"""Methods that change a weight, what they are told about it, and the arithmetic that they share."""

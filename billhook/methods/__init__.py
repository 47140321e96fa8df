"""Methods that change a weight, the statistics that they read, and the numerics that they share."""

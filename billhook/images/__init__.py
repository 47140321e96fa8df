"""From a SOURCE of images to pixel values and labels."""

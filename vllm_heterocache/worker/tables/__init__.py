"""Page tables on the device, and what fills and proves them."""

"""The operations on the device, with one implementation a platform."""

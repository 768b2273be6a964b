"""Pixels, frames and chat text to arrays. Nothing here knows Flax or touches a device."""
